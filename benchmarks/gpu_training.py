"""Sections of `gpu.py` on the loss and on whole training steps, beside TRL's and Liger's.

Left out: the same on a CPU (`bench.py`, `conditions.py`).
"""

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from gpu_bench import KL_BUDGET, Bench, build, copy_bandwidth, models_of, prompts_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from trb import TRBConfig, TRBTrainer
from trb.losses import ReverseKL, TokenBatch, chunked_reverse_kl, default_chunk_tokens
from trb.losses import triton as losses_triton
from trb.losses.terms import Chunk
from trb.policies import StudentPolicy, TrustRegionPolicy
from trb.sampling import sample
from trb.vocab import SharedVocabulary

SUPPORTS = {"top 16": 16, "whole vocabulary": 0}
# From the hidden states of student and teacher and their heads.
Loss = Callable[[Tensor, Tensor, torch.nn.Linear, torch.nn.Linear], Tensor]


# --- the loss ------------------------------------------------------------


def fused(bench: Bench) -> bool:
    logits = torch.empty(0, 1, device=bench.device)
    return losses_triton.available(logits, logits, 0, 1, 1)


def logits_pair(bench: Bench, rows: int, width: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits about a nat apart; nothing ties with the last of the top `k`, where eager and fused may choose apart."""
    generator = torch.Generator(bench.device).manual_seed(k)
    student, noise = torch.randn(2, rows, width, device=bench.device, generator=generator)
    student = 3 * student
    if k:
        student.scatter_add_(1, student.topk(k).indices, torch.ones_like(student[:, :k]))
    return student.to(dtype), (student + noise).to(dtype)


def check_loss(bench: Bench) -> None:
    """the fused loss against the eager one in float64: values, metrics and gradients, folded stop ids, padded heads"""
    if not fused(bench):
        bench.numbers["skipped"] = "Triton is missing, or there is no GPU"
        bench.expect(bench.device.type != "cuda", "the fused loss is unavailable on this GPU")
        return
    width = bench.shapes.student["vocab_size"]
    vocabulary = SharedVocabulary(width - 5, 3, (7, width - 9))
    # Each support and dtype is a kernel of its own, and takes seconds to compile.
    cases = [(torch.bfloat16, k) for k in (1, 16, 64, 0)]
    cases += [(dtype, k) for dtype in (torch.float16, torch.float32) for k in (16, 0)]
    for dtype, k in cases:
        for temperature in (1.0, 0.7):
            student, teacher = logits_pair(bench, 24, width, k, dtype)
            name = f"{str(dtype).removeprefix('torch.')}, top {k or 'all'}, temperature {temperature:g}"
            check_rows(bench, name, student, teacher, vocabulary, k, temperature)


def check_rows(
    bench: Bench,
    name: str,
    student: Tensor,
    teacher: Tensor,
    vocabulary: SharedVocabulary,
    k: int,
    temperature: float,
) -> None:
    token = torch.arange(8, 8 + len(student), device=bench.device)
    gradient = torch.full_like(student, torch.nan)
    loss, metrics = losses_triton.reverse_kl_chunk(
        Chunk(student, teacher, token, None, gradient),
        k=k,
        temperature=temperature,
        size=vocabulary.size,
        stop_ids=vocabulary.stop_ids,
    )
    used = losses_triton.available(student, teacher, k, vocabulary.size, len(vocabulary.stop_ids))
    bench.expect(used, f"{name}: the fused loss is not used")
    same = torch.nn.Identity()  # a head, so that the eager loss is given logits
    hidden = student.double().requires_grad_()
    total, exact = ReverseKL(k)(
        TokenBatch(hidden, teacher.double(), same, same, token, vocabulary, temperature, normaliser=1.0)
    )
    total.backward()
    assert hidden.grad is not None
    eps = torch.finfo(student.dtype).eps
    errors = {
        "loss": (loss.double().sum() - total.detach()).abs().item() / len(token),
        "gradient": ((gradient.double() - hidden.grad).abs() - eps * hidden.grad.abs()).max().item(),
        **{
            key: (metric.double() - value).abs().max().item()
            for metric, (key, value) in zip(metrics, vars(exact).items(), strict=True)
        },
    }
    bench.log(name, **errors)
    # Logits reach 25: some ten roundings of that to float32.
    for key, error in errors.items():
        bench.expect(error <= 3e-5, f"{name}: {key} is off by {error:.3g}")


def time_loss(bench: Bench) -> None:
    """the loss with its gradient, eager and fused, beside TRL's and Liger's; the kernel's bytes beside a copy's"""
    if fused(bench):
        time_kernel(bench)
    shapes, dtype = bench.shapes, torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    vocabulary = shapes.student["vocab_size"]
    widths = shapes.student["hidden_size"], shapes.teacher["hidden_size"]
    heads = [torch.nn.Linear(width, vocabulary, False, bench.device, dtype) for width in widths]
    for head in heads:
        torch.nn.init.normal_(head.weight, std=width_scale(head))
    heads[1].requires_grad_(False)
    for tokens in shapes.loss_tokens:
        hidden = [torch.randn(tokens, width, device=bench.device, dtype=dtype) for width in widths]
        for name, loss in losses(bench):
            label = f"{name}, {tokens} tokens"
            try:
                bench.log(label, **forward_and_backward(bench, loss, hidden, heads))
            # Of peers whose names move between versions, or what does not fit: a finding, not a failed run.
            except Exception as error:
                bench.log(label, error=f"{type(error).__name__}: {error}"[:500])
                bench.expect(not name.startswith("trb"), f"{label} broke: {type(error).__name__}: {error}"[:500])


def width_scale(head: torch.nn.Linear) -> float:
    """Of weights that give logits of standard deviation 3."""
    return 3 * head.in_features**-0.5


def forward_and_backward(
    bench: Bench, loss: Loss, hidden: list[Tensor], heads: list[torch.nn.Linear]
) -> dict[str, float | None]:
    """Milliseconds, the most memory beyond what hidden states and heads take, and the loss."""
    student = hidden[0].detach().requires_grad_()

    def run() -> Tensor:
        student.grad = heads[0].weight.grad = None
        value = loss(student, hidden[1], heads[0], heads[1])
        value.backward()
        return value.detach()

    run()
    student.grad = heads[0].weight.grad = None
    held = torch.cuda.memory_allocated(bench.device) / 1e9 if bench.device.type == "cuda" else 0.0
    with bench.peak_memory() as memory:
        value = run().item()
    if memory["memory_gb"] is not None:
        memory["memory_gb"] -= held
    return {"milliseconds": 1e3 * bench.seconds(run), "loss": value, **memory}


def losses(bench: Bench) -> Iterator[tuple[str, Loss]]:
    """Every contender that can be had here, by name."""
    for support, k in SUPPORTS.items():
        if fused(bench):
            yield f"trb, fused, {support}", functools.partial(our_loss, k=k)
        yield f"trb, eager, {support}", functools.partial(eager_loss, k=k)
    yield "TRL, whole vocabulary", trl_loss
    if importlib.util.find_spec("liger_kernel") is not None:
        yield "Liger, whole vocabulary", functools.partial(liger_loss, compiled=False)
        if bench.device.type == "cuda":
            yield "Liger compiled, whole vocabulary", functools.partial(liger_loss, compiled=True)


def our_loss(
    student: Tensor, teacher: Tensor, student_head: torch.nn.Linear, teacher_head: torch.nn.Linear, *, k: int
) -> Tensor:
    token = torch.zeros(len(student), dtype=torch.long, device=student.device)
    return chunked_reverse_kl(student, teacher, student_head, teacher_head, token, torch.ones_like(token), k=k)[0]


def eager_loss(*arguments: Any, k: int) -> Tensor:
    with mock.patch.object(losses_triton, "available", lambda *_: False):
        return our_loss(*arguments, k=k)


def trl_loss(student: Tensor, teacher: Tensor, student_head: torch.nn.Linear, teacher_head: torch.nn.Linear) -> Tensor:
    """What `trl.DistillationTrainer` minimises with `beta=1`."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(student), dtype=torch.long, device=student.device)
    weights = student_head.weight, teacher_head.weight
    return _chunked_divergence_loss(student[None], teacher[None], *weights, mask, beta=1.0)[0]


def liger_loss(
    student: Tensor, teacher: Tensor, student_head: torch.nn.Linear, teacher_head: torch.nn.Linear, *, compiled: bool
) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)
    label = torch.zeros(len(student), dtype=torch.long, device=student.device)
    return loss(student, student_head.weight, teacher, teacher_head.weight, label)


def time_kernel(bench: Bench) -> None:
    """One chunk of logits: bytes that must move at least, beside a copy's; and what `torch.topk` alone takes."""
    vocabulary = bench.shapes.student["vocab_size"]
    rows = 2 if bench.smoke else default_chunk_tokens(vocabulary, bench.device.type)
    bandwidth = copy_bandwidth(bench)
    bench.log("copy", gb_per_s=bandwidth / 1e9)
    token = torch.zeros(rows, dtype=torch.long, device=bench.device)
    for k in (0, 16, 64):
        student, teacher = logits_pair(bench, rows, vocabulary, 0, torch.bfloat16)
        gradient = torch.empty_like(student)
        options = {"k": k, "temperature": 1.0, "size": vocabulary, "stop_ids": [0]}
        chunk = Chunk(student, teacher, token, None, gradient)
        kernel = functools.partial(losses_triton.reverse_kl_chunk, chunk, **options)
        moved = (4 if k else 5) * student.nbytes  # both models, the student again (and the teacher), the gradient
        name = f"kernel, {rows} rows, top {k or 'all'}"
        seconds = bench.seconds(kernel)
        share = moved / seconds / bandwidth
        bench.log(name, milliseconds=1e3 * seconds, gb_moved=moved / 1e9, share_of_copy_bandwidth=share)
        for block, warps in () if bench.smoke or k == 64 else ((2048, 16), (4096, 16), (8192, 32)):
            tried = bench.seconds(kernel, block=block, warps=warps)
            bench.log(f"{name}, block {block}, {warps} warps", milliseconds=1e3 * tried)
        if k:
            bench.log(f"torch.topk, {rows} rows, {k}", milliseconds=1e3 * bench.seconds(student.topk, k))


# --- whole steps ------------------------------------------------------------


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, sampling included."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seconds = bench, list[float]()
        self._end: Callable[[], float] | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._end = self.bench.stopwatch()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._end is not None:
            self.seconds.append(self._end())


def time_training(bench: Bench) -> None:
    """whole optimizer steps, plain and warm-up, beside TRL's trainer with `generate`; the second step of each counts"""
    budget = {"method": "fixed", "initial_kl_budget": KL_BUDGET}
    contenders: dict[str, Callable[..., Any]] = {
        "plain": functools.partial(our_trainer, knobs={"method": "opd"}),
        f"warm-up {KL_BUDGET:g}": functools.partial(our_trainer, knobs=budget),
        "TRL": trl_trainer,
    }
    _, teacher = models_of(bench)
    # A student of its own is trained: masters in float32.
    bench.models = None
    shapes = bench.shapes
    tokenizer = words(shapes.student["vocab_size"])
    rows = 2 * shapes.training_rows * shapes.training_passes
    texts = [{"prompt": tokenizer.decode(ids)} for ids in torch.randint(9, 99, (rows, shapes.training_prompt)).tolist()]
    for name, trainer_of in contenders.items():
        student = build(bench, shapes.student, seed=0, dtype=torch.float32).requires_grad_(True)
        for model in (student, teacher):
            stop_at(model, tokenizer.eos_token_id)
        clock, lengths = StepClock(bench), []
        with tempfile.TemporaryDirectory() as directory, bench.peak_memory() as memory:
            trainer = trainer_of(student, teacher, tokenizer, Dataset.from_list(texts), step_options(bench, directory))
            count_tokens(trainer, lengths)
            trainer.add_callback(clock)
            trainer.train()
        tokens = sum(lengths) / len(clock.seconds)
        first, second = clock.seconds
        bench.log(name, seconds=second, first_step_s=first, tokens=tokens, tokens_per_s=tokens / second, **memory)
        bench.expect(tokens >= 0.9 * rows / 2 * shapes.training_completion, f"{name}: completions stopped early")
        del trainer, student


def words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` made-up words, of which the last ends a completion: hardly ever drawn, so that completions
    are as long as they may be."""
    known = {f"w{index}": index for index in range(size - 2)} | {"<pad>": size - 2, "<stop>": size - 1}
    tokenizer = Tokenizer(WordLevel(known, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<stop>", pad_token="<pad>")


def stop_at(model: Qwen3ForCausalLM, token: int) -> None:
    model.config.eos_token_id = model.generation_config.eos_token_id = token


def step_options(bench: Bench, directory: str) -> dict[str, Any]:
    """What every contender's trainer is told."""
    on_gpu = bench.device.type == "cuda"
    return {
        "output_dir": directory,
        "per_device_train_batch_size": bench.shapes.training_rows,
        "gradient_accumulation_steps": bench.shapes.training_passes,
        "max_completion_length": bench.shapes.training_completion,
        "max_steps": 2,
        "learning_rate": 1e-5,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "disable_dropout": True,
        "temperature": 1.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def our_trainer(
    model: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
    tokenizer: Any,
    rows: Dataset,
    shared: dict[str, Any],
    knobs: dict[str, Any],
) -> TRBTrainer:
    args = TRBConfig(**shared, loss_top_k=0, num_generations=1, **knobs)
    return TRBTrainer(model, teacher, args, train_dataset=rows, processing_class=tokenizer)


def trl_trainer(
    model: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, tokenizer: Any, rows: Dataset, shared: dict[str, Any]
) -> DistillationTrainer:
    args = DistillationConfig(**shared, beta=1.0)
    return DistillationTrainer(model, teacher, args, train_dataset=rows, processing_class=tokenizer)


def count_tokens(trainer: Any, lengths: list[int]) -> None:
    """Add the completion tokens of every pass to a list."""
    loss = trainer.compute_loss

    def counted(model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        lengths.append(int(inputs["completion_mask"].sum()))
        return loss(model, inputs, *arguments, **options)

    trainer.compute_loss = counted


def time_long_sampling(bench: Bench) -> None:
    """sampling alone, with the lengths of whole steps, from the student's law and the trust region's"""
    student, teacher = models_of(bench)
    shapes, stop = bench.shapes, bench.shapes.student["vocab_size"] - 1
    for batch in shapes.long_batches:
        prompts = prompts_of(bench, batch, shapes.training_prompt)
        for name, policy in (("student", StudentPolicy()), ("trust region", TrustRegionPolicy(KL_BUDGET))):
            run = functools.partial(sample, student, teacher, prompts, policy, eos_token_id=stop)
            label = f"{name}, batch {batch}"
            try:
                run(max_new_tokens=min(16, shapes.training_completion), seed=1)  # captures graphs
                with bench.peak_memory() as memory:
                    seconds, rollout = bench.once(run, max_new_tokens=shapes.training_completion, seed=0)
            except torch.OutOfMemoryError as error:
                bench.log(label, error=str(error)[:500])
                continue
            tokens = sum(map(len, rollout.completions))
            bench.log(label, tokens_per_s=tokens / seconds, seconds=seconds, tokens=tokens, **memory)
