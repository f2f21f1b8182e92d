"""The documentation: links lead somewhere, examples run, and what is listed is what there is.

The pages are those of the repository that this file lies in; the examples run with the dcp_fast that is installed.
"""

from __future__ import annotations

import builtins
import inspect
import os
import pickle
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.fsdp import StateDictType, fully_shard

import dcp_fast
from dcp_fast.tools import cli

ROOT = Path(__file__).resolve().parents[3]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
PAGES += ["benchmarks/README.md", "tests/simulated_cuda/README.md"]
README_LINES = 120

# A python block that begins with this comment is shown to readers, and not run here.
NEEDS_GPU = "# Needs a GPU."
# One that begins with this is run by real ranks, each of which has made what the page takes for granted.
ON_RANKS = "# On each rank of a job:"

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
# Names of files of the repository in code and commands; `*` and the like are patterns.
FILE = re.compile(r"(?:benchmarks|cmake|csrc|dcp_fast|demo|docs|tests|tools|\.ci|\.github)/[\w./*-]*")
# Made by what the pages describe, and not there before.
MADE = {"benchmarks/data", "benchmarks/results"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(page: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", text_of(page))


def blocks_of(page: str, language: str) -> list[str]:
    return [code for tag, code in FENCE.findall(text_of(page)) if tag == language]


def anchors_of(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    anchors: set[str] = set()
    for heading in HEADING.findall(prose_of(page)):
        text = LINK.sub(lambda link: link[0].partition("](")[0][1:], heading)
        anchor = base = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number = 0
        while anchor in anchors:
            number += 1
            anchor = f"{base}-{number}"
        anchors.add(anchor)
    return anchors


def commands_of(page: str) -> Iterator[list[str]]:
    """The words of each command line that a page shows."""
    shown = blocks_of(page, "bash")
    shown += [block for block in INDENTED.findall(prose_of(page)) if not re.search(r"->|\.\.\. the program", block)]
    for block in shown:
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\||;", line):
                try:
                    words = shlex.split(command, comments=True)
                except ValueError:  # not a command
                    continue
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of the environment
                    words.pop(0)
                if words:
                    yield words


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    wrong = []
    for target in LINK.findall(prose_of(page)):
        if re.match(r"[a-z]+:", target):  # another site
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path if path else ROOT / page).resolve()
        exists = file.is_relative_to(ROOT) and file.exists()
        if not exists or (anchor and anchor not in anchors_of(str(file.relative_to(ROOT)))):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    words = [word for command in commands_of(page) for word in command]
    if page != "CHANGELOG.md":  # which may tell of files that are gone
        words += CODE.findall(prose_of(page))
    named = {match[0].rstrip("/.") for word in words for match in FILE.finditer(word) if is_whole(word, match)}
    missing = {name for name in named - MADE if not any(ROOT.glob(name))}
    assert not missing


def is_whole(word: str, match: re.Match[str]) -> bool:
    """Whether a name is not the end of a longer one, such as build/native/tests."""
    return not re.search(r"[\w./-]$", word[: match.start()])


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page: str) -> None:
    for command in commands_of(page):
        if command[0].startswith(("python", ".venv")) and "-m" in command:
            module = command[command.index("-m") + 1]
            if module not in ("pip", "pytest", "venv"):
                assert list(ROOT.glob(f"{module.replace('.', '/')}/__main__.py")), command
        if command[0] == "dcp-fast" and "--help" not in command:
            cli._parser().parse_args(command[1:])


def make_fsdp(path: str) -> dict[str, Any]:
    """What docs/optimizer.md takes for granted in its first example: a model, its optimizer, and a checkpoint."""
    model = FSDP(torch.nn.Linear(8, 8), device_id=torch.device("cpu"))
    optimizer = trained(model)
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        state = {"model": model.state_dict(), "optim": FSDP.optim_state_dict(model, optimizer)}
    torch_save(state, checkpoint_id=path)
    return {"model": model, "optimizer": optimizer}


def make_fsdp2(path: str) -> dict[str, Any]:
    """The same for its second example."""
    model = torch.nn.Linear(8, 8)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = trained(model)
    model_state, state = get_state_dict(model, optimizer)
    torch_save({"model": model_state, "optim": state}, checkpoint_id=path)
    return {"model": model, "optimizer": optimizer}


def trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return optimizer


# By page: what makes the surroundings of each of its blocks that run on ranks.
SURROUNDINGS: dict[str, list[Callable[[str], dict[str, Any]]]] = {"docs/optimizer.md": [make_fsdp, make_fsdp2]}


def run_as_rank(folder: str, codes: list[str], surroundings: list[Callable[[str], dict[str, Any]]]) -> int:
    """Run blocks of a page, each in its surroundings, and check that it loads the optimizer's state. How many ran."""
    namespace: dict[str, Any] = {}
    for number, (code, make) in enumerate(zip(codes, surroundings, strict=True)):
        os.makedirs(f"{folder}/{number}", exist_ok=True)
        os.chdir(f"{folder}/{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            namespace |= make("ckpt")
            saved = state_of(namespace["optimizer"])
            forget(namespace["optimizer"])
            assert state_of(namespace["optimizer"]) != saved
            exec(compile(code, f"block {number + 1}", "exec"), namespace)
            assert state_of(namespace["optimizer"]) == saved
    return len(codes)


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: local(value).tolist() for key, value in state.items()} for state in optimizer.state.values()]


def forget(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            local(value).zero_()


def local(value: Any) -> torch.Tensor:
    """This rank's part of a DTensor, or the tensor itself."""
    part: torch.Tensor = value.to_local() if hasattr(value, "to_local") else value
    return part


@pytest.mark.parametrize("page", SURROUNDINGS)
def test_examples_run_on_ranks(page: str, tmp_path: Path, ranks: Ranks) -> None:
    codes = [code for code in blocks_of(page, "python") if code.startswith(ON_RANKS)]
    assert ranks.run(2, run_as_rank, str(tmp_path), codes, SURROUNDINGS[page]) == [len(codes)] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "python")])
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All other blocks of a page in their order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    allowed = torch.serialization.get_safe_globals()
    try:
        for number, code in enumerate(blocks_of(page, "python")):
            compiled = compile(code, f"{page}, python block {number + 1}", "exec")
            if code.startswith(ON_RANKS):
                assert page in SURROUNDINGS
            elif not code.startswith(NEEDS_GPU):
                exec(compiled, namespace)
    finally:
        # What a page allows, others must not find allowed.
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
        dcp_fast.uninstall()


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= README_LINES


def test_no_page_is_lost() -> None:
    """Every page of docs/ is linked from the README."""
    linked = {target.partition("#")[0] for target in LINK.findall(text_of("README.md"))}
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


def class_of(name: str) -> Any:
    for place in (dcp_fast, builtins):
        if hasattr(place, name):
            return getattr(place, name)
    others = (pickle.UnpicklingError, torch.OutOfMemoryError, SafetensorError)
    return next(cls for cls in others if cls.__name__ == name.rpartition(".")[2])


def test_errors_are_listed_with_their_bases() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text_of("docs/errors.md"), re.MULTILINE)
    listed = set()
    for name, bases in rows:
        cls = getattr(dcp_fast, name)
        listed.add(cls)
        for base in CODE.findall(bases):
            assert issubclass(cls, class_of(base)), f"{name} is no {base}"
    public = {getattr(dcp_fast, name) for name in dcp_fast.__all__}
    assert listed == {cls for cls in public if isinstance(cls, type) and issubclass(cls, dcp_fast.LoadError)} - {
        dcp_fast.LoadError
    }


def test_names_and_options_are_listed() -> None:
    page = text_of("docs/api.md")
    errors = {name for name in dcp_fast.__all__ if name.endswith("Error")}
    named = set(CODE.findall(page))
    assert set(dcp_fast.__all__) - errors <= named
    ours, theirs = inspect.signature(dcp_fast.load), inspect.signature(torch_load)
    options = set(ours.parameters) - set(theirs.parameters)
    options |= keyword_only(dcp_fast.FileSystemReader) | keyword_only(dcp_fast.DefaultLoadPlanner)
    assert options <= named


def keyword_only(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
