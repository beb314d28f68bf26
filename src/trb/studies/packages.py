"""Optional packages: which of them a run's options ask for, and one line for those that are missing.

Left out: packages of data and models, which say so where they are opened (`trb.tasks.sources`, `trb.models.packaged`),
and whether the version that is installed does.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from trb.errors import PackageError
from trb.models.quantization import QUANTIZATIONS
from trb.training.config import TRBConfig
from trb.training.resume import plain

__all__ = ["missing_packages", "require_packages"]

# report_to -> modules, any of which will do where they are in a group, and what pip calls the first.
REPORTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-sdk"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "kubeflow": ((), ""),  # a server, which its environment names
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}

# What the name of an optimizer begins or ends with -> module, and what pip calls it.
_OPTIMIZERS: dict[str, tuple[str, str]] = {
    "galore_": ("galore_torch", "galore-torch"),
    "apollo_": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "adamw_torch_xla": ("torch_xla", "torch-xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch-npu"),
    **dict.fromkeys(("ademamix", "lion_", "paged_", "rmsprop_bnb"), ("bitsandbytes", "bitsandbytes")),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), ("bitsandbytes", "bitsandbytes")),
}


def missing_packages(args: TRBConfig, quantization: str | None = None) -> list[str]:
    """What the options of a run need and this environment lacks, each with the command that installs it.

    `quantization` is the teacher's, a name of `trb.models.quantization.QUANTIZATIONS`.
    """
    return [
        f"{option} needs {' or '.join(modules)}: pip install {package}"
        for option, modules, package in _needed(args, quantization)
        if modules and not any(find_spec(module) for module in modules)
    ]


def require_packages(args: TRBConfig, quantization: str | None = None) -> None:
    """Refuse options whose packages are missing. Raises PackageError."""
    if missing := missing_packages(args, quantization):
        raise PackageError("; ".join(missing))


def _needed(args: TRBConfig, quantization: str | None) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(option, modules of which any will do, what pip calls it) for every option that asks for a package."""
    reporters: Any = args.report_to or []
    for name in [reporters] if isinstance(reporters, str) else reporters:
        modules, package = REPORTERS.get(str(name), ((), ""))
        yield f"report_to: {name}", modules, package
    optimizer = str(plain(args.optim))
    for start, (module, package) in _OPTIMIZERS.items():
        if optimizer.startswith(start):
            yield f"optim: {optimizer}", (module,), package
            break
    if quantization is not None:
        package = QUANTIZATIONS[quantization].package
        yield f"teacher_quantization: {quantization}", (package,), package
    if args.use_vllm:
        yield "use_vllm", ("vllm",), "'trb[vllm]'"
    if args.use_liger_kernel:
        yield "use_liger_kernel", ("liger_kernel",), "liger-kernel"
    if args.deepspeed:
        yield "deepspeed", ("deepspeed",), "deepspeed"
