"""Chat templates made to leave their sandbox or never to end, by every way for one to come in."""

import contextlib
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from hostile_helpers import RECIPE, SECONDS, Bomb, each, model_copy, refused, slow
from jinja2.exceptions import TemplateError

from trb import TRBConfig, TRBTrainer, zoo
from trb.models.loading import load_tokenizer
from trb.studies.material import load_tokenizers
from trb.studies.recipe import make_recipe
from trb.tasks.prompts import render

TEMPLATES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__['__builtins__']['exec']('0') }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('true') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "attr": "{{ messages|attr('__class__') }}{{ (messages|attr('__class__')).__mro__ }}",
    "namespace": "{{ namespace.__init__.__globals__['__builtins__']['exec']('0') }}",
}


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def template_refused(folder: Path, template: str) -> None:
    model = model_copy(folder)
    (model / "chat_template.jinja").write_text(template)
    refused(lambda: load_tokenizer(str(model)))


@each("template", slow_ones=TEMPLATES.keys() - {"cycler"}, **TEMPLATES)
def test_out_of_the_sandbox(folder: Path, template: str) -> None:
    model = model_copy(folder)
    code = Bomb(folder).code
    (model / "chat_template.jinja").write_text(template.replace("'0'", repr(code)))
    with contextlib.suppress(ValueError, TemplateError):
        tokenizer = load_tokenizer(str(model))
        rendered = render(tokenizer, [{"prompt": [{"role": "user", "content": "x"}]}])
        assert "class '" not in tokenizer.decode(rendered[0])


@slow
def test_loops_without_end(folder: Path) -> None:
    template_refused(folder, ENDLESS)


@each("how", recipe="recipe", trainer="trainer", options="options", render="render")
def test_a_template_from_elsewhere(folder: Path, how: str) -> None:
    """Every way for a template to come in that is no model's directory."""
    template = "{{ lipsum.__globals__['os'].system('true') }}"  # refused at once, where an endless one takes seconds
    (folder / "template.jinja").write_text(template)
    if how == "recipe":
        recipe = make_recipe({**RECIPE, "chat_template": str(folder / "template.jinja")})
        refused(lambda: load_tokenizers(recipe.run))
    elif how == "options":
        options = {"output_dir": str(folder / "run"), "chat_template_kwargs": {"chat_template": template}}
        refused(lambda: TRBConfig(report_to="none", **options))
    elif how == "render":
        rows = [{"prompt": [{"role": "user", "content": "x"}]}]
        refused(lambda: render(zoo.load("student")[1], rows, chat_template=template))
    else:
        model = model_copy(folder)
        (model / "chat_template.jinja").write_text(template)
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": "1+1"}]}] * 4)
        arguments = TRBConfig(output_dir=str(folder / "run"), report_to="none")
        refused(lambda: TRBTrainer(str(model), zoo.load("student")[0], arguments, data))


@slow
def test_a_file_that_never_ends_for_an_evaluation(folder: Path) -> None:
    (folder / "template.jinja").write_text(ENDLESS)
    command = ["eval", "--model", "zoo:student", "--data", "zoo:chains", "--limit", "2", "--max-new-tokens", "4"]
    command += ["--chat-template", str(folder / "template.jinja")]
    done = subprocess.run([sys.executable, "-m", "trb", *command], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert "is not used: it does not render within" in done.stderr


@each(
    "template",
    slow_ones=("repeated", "long", "doubled"),
    repeated="{{ 'x' * 10000000000 }}",
    long="{{ 'x' * 20000000 }}",
    range="{% for i in range(1000000000) %}x{% endfor %}",
    doubled="{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
)
def test_output_without_end(folder: Path, template: str) -> None:
    template_refused(folder, template)
