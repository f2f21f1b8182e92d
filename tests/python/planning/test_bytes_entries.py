"""Bytes entries, the values that are no tensors: as torch loads them, if no code can come of it or it is asked for."""

from __future__ import annotations

import collections
import enum
import functools
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from damage import edit_metadata, fast_error, legacy_record, span
from helpers import (
    Entry,
    fast_reader,
    fill,
    image,
    load_with,
    save,
    torch_load,
    torch_planner,
    torch_reader,
    write_checkpoint,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

import dcp_fast
from dcp_fast.errors import UntrustedBytesError


@dataclass
class Progress:
    epoch: int
    losses: list[float]


class Phase(enum.Enum):
    WARM_UP = 1
    DECAY = 2

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As since Python 3.11.4; before, enums were pickled as a call of getattr, which nobody should allow.
        return type(self), (self.value,)


class Tokens(int):
    pass


def param_groups() -> list[dict[str, Any]]:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}])
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    return groups


def attributed() -> Any:
    value = collections.OrderedDict(a=1)
    value.note = "kept"  # type: ignore[attr-defined]
    return value


ALLOWED: dict[str, Any] = {
    "int": 7,
    "large int": -(1 << 1000),
    "float": 0.1,
    "not a number": float("nan"),
    "complex": 1 + 2j,
    "bool": True,
    "none": None,
    "text": "\u00e9\ud800 text",
    "bytes": bytes(range(256)),
    "bytearray": bytearray(b"\0\xff"),
    "list": [1, 2.0, "three", None],
    "nested": {"a": {"b": [{"c": (1, ())}]}, 3: {}},
    "set": {1, 2},
    "OrderedDict": collections.OrderedDict(b=1, a=collections.OrderedDict()),
    "OrderedDict with attributes": attributed(),
    "Counter": collections.Counter("abca"),
    "torch.Size": torch.Size([3, 4]),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "layout": torch.strided,
    "tensors": (torch.arange(5), {"half": fill((3, 2), torch.bfloat16).t()}),
    "parameter": (torch.nn.Parameter(torch.ones(2)),),
    "torch RNG": {"cpu": torch.get_rng_state()},
    "random.getstate": random.getstate(),
    "param_groups": param_groups(),
}

# What is no inert type: the value, the globals that an error must name, and what must be
# registered for it to load; None if that does not help.
REFUSED: dict[str, tuple[Any, list[str], list[Any] | None]] = {
    "dataclass": (Progress(3, [0.5]), [f"{__name__}.Progress"], [Progress]),
    "enum": ([Phase.DECAY], [f"{__name__}.Phase"], [Phase]),
    "int subclass": (Tokens(5), [f"{__name__}.Tokens"], [Tokens]),
    "types": ([type(None), Progress], ["type", f"{__name__}.Progress"], None),
    "function": (functools.partial(torch.ones, 2), ["functools.partial"], None),
    "defaultdict of code": (collections.defaultdict(Progress), [f"{__name__}.Progress"], [Progress]),
    "two types": ([Tokens(5), Phase.DECAY], [f"[{__name__}.Tokens, {__name__}.Phase]"], [Tokens, Phase]),
    "numpy array of objects": (
        numpy.array([1, "a"], dtype=object),
        ["multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "numpy.dtypes.ObjectDType"],
        [numpy._core.multiarray._reconstruct, numpy.ndarray, numpy.dtype, numpy.dtypes.ObjectDType],
    ),
}


def store(path: Path, value: Any, **options: Any) -> Path:
    return write_checkpoint(path, {"value": Entry(value=value, **options), "t": Entry.of(torch.ones(3))})


def wanted() -> dict[str, Any]:
    return {"value": "before", "t": torch.zeros(3)}


def expected(path: Path) -> Any:
    """The image of what torch loads."""
    state = wanted()
    torch_load(state, storage_reader=torch_reader(path), planner=torch_planner())
    assert image(state["value"]) != image("before")
    return image(state)


def assert_refused(path: Path, error: BaseException | None, names: list[str], fqn: str = "value") -> None:
    assert isinstance(error, UntrustedBytesError), repr(error)
    entry = span(path, fqn)
    assert (error.path, error.fqn, error.offset, error.length) == (str(entry.path), fqn, entry.offset, entry.length)
    for name in (*names, "trust_bytes=True"):
        assert name in error.reason


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("trust", [True, False])
@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_value(tmp_path: Path, name: str, trust: bool, flatten: bool) -> None:
    store(tmp_path, ALLOWED[name])
    state = wanted()
    planner = dcp_fast.DefaultLoadPlanner(flatten, flatten, trust_bytes=trust)
    dcp_fast.load(state, checkpoint_id=tmp_path, planner=planner)
    assert image(state) == expected(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_value(tmp_path: Path, name: str, legacy: bool) -> None:
    value, names, safe = REFUSED[name]
    store(tmp_path, value, legacy=legacy)
    state = wanted()
    error = fast_error(tmp_path, state)
    assert_refused(tmp_path, error, names)
    assert ("add_safe_globals" in str(error)) == (name != "function")  # its attribute of a class is never allowed
    assert "install(trust_bytes=True)" in str(error)
    assert state["value"] == "before"
    dcp_fast.load(state, checkpoint_id=tmp_path, trust_bytes=True)
    assert image(state) == expected(tmp_path)
    if safe is not None:
        state = wanted()
        with torch.serialization.safe_globals(safe):
            dcp_fast.load(state, checkpoint_id=tmp_path)
        assert image(state) == expected(tmp_path)


def test_what_is_registered_is_not_named(tmp_path: Path) -> None:
    store(tmp_path, [Phase.DECAY, Tokens(5)])
    with torch.serialization.safe_globals([Phase]):
        error = fast_error(tmp_path, wanted())
    assert_refused(tmp_path, error, [f"asks for {__name__}.Tokens,"])
    assert "Phase" not in str(error)
    store(tmp_path, numpy.array([1, "a"], dtype=object))
    with torch.serialization.safe_globals([numpy._core.multiarray._reconstruct, numpy.ndarray, numpy.dtype]):
        error = fast_error(tmp_path, wanted())
    # No global of the pickle: the class of an object that a call returned.
    assert_refused(tmp_path, error, ["numpy.dtypes.ObjectDType", "add_safe_globals"])
    assert "weights_only` argument" not in str(error), "torch's advice for its own callers"


def test_entry_without_checksum(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        store(tmp_path, Phase.DECAY)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_refused(tmp_path, fast_error(tmp_path, wanted()), [f"{__name__}.Phase"])


def test_torchs_variable_lifts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for torch, where nobody has said otherwise in the program."""
    store(tmp_path, Phase.DECAY)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    state = wanted()
    dcp_fast.load(state, checkpoint_id=tmp_path)
    assert state["value"] is Phase.DECAY
    assert dcp_fast.DefaultLoadPlanner().trust_bytes
    assert not dcp_fast.DefaultLoadPlanner(trust_bytes=False).trust_bytes
    with pytest.raises(CheckpointException):
        dcp_fast.load(wanted(), checkpoint_id=tmp_path, trust_bytes=False)
    planner = torch_planner()
    with dcp_fast.install():
        assert not refuses(dcp.load, checkpoint_id=tmp_path, planner=planner)
    with dcp_fast.install(trust_bytes=False):
        assert refuses(dcp.load, checkpoint_id=tmp_path, planner=planner)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    assert not dcp_fast.DefaultLoadPlanner().trust_bytes
    with dcp_fast.install():
        assert refuses(dcp.load, checkpoint_id=tmp_path, planner=planner)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    assert_refused(tmp_path, fast_error(tmp_path, wanted()), [f"{__name__}.Phase"])


class Scheduler:
    """A Stateful with a state of its own."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"step": 0} if self.state is None else self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_stateful(tmp_path: Path) -> None:
    save(tmp_path, {"scheduler": Scheduler({"step": 5})})
    scheduler = Scheduler()
    dcp_fast.load({"scheduler": scheduler}, checkpoint_id=tmp_path)
    assert scheduler.state == {"step": 5}


def test_refused_state_of_a_stateful(tmp_path: Path) -> None:
    save(tmp_path, {"scheduler": Scheduler({"step": Phase.DECAY})})
    scheduler = Scheduler()
    names = [f"{__name__}.Phase"]
    assert_refused(tmp_path, fast_error(tmp_path, {"scheduler": scheduler}), names, "scheduler.step")
    assert scheduler.state is None
    dcp_fast.load({"scheduler": scheduler}, checkpoint_id=tmp_path, trust_bytes=True)
    assert scheduler.state == {"step": Phase.DECAY}


# The switches


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    """A checkpoint whose value only a planner that trusts it loads."""
    return store(tmp_path / "ckpt", Phase.DECAY)


def refuses(load: Callable[..., None], **arguments: Any) -> bool:
    """Whether a load refuses the value of that checkpoint; if not, it must have loaded it."""
    outcome = load_with(load, wanted(), **arguments)
    if outcome.errors is None:
        assert outcome.state["value"] == Phase.DECAY
        return False
    (error,) = outcome.errors.values()
    assert isinstance(error, UntrustedBytesError), repr(error)
    return True


def test_switch_of_load(refused: Path) -> None:
    assert refuses(dcp_fast.load, checkpoint_id=refused)
    assert refuses(dcp_fast.load, checkpoint_id=refused, trust_bytes=False)
    assert not refuses(dcp_fast.load, checkpoint_id=refused, trust_bytes=True)


@pytest.mark.parametrize("planners", [False, True])
def test_switch_of_load_holds_for_that_load(refused: Path, planners: bool) -> None:
    planner = dcp_fast.DefaultLoadPlanner(trust_bytes=planners)
    assert refuses(dcp_fast.load, checkpoint_id=refused, planner=planner) == (not planners)
    assert refuses(dcp_fast.load, checkpoint_id=refused, planner=planner, trust_bytes=planners) == (not planners)
    assert refuses(dcp_fast.load, checkpoint_id=refused, planner=planner, trust_bytes=not planners) == planners
    assert planner.trust_bytes == planners
    with pytest.raises(ValueError, match="trace needs"):
        dcp_fast.load(wanted(), storage_reader=torch_reader(refused), planner=planner, trust_bytes=True, trace="x")
    assert planner.trust_bytes == planners


def test_switch_needs_our_planner(refused: Path) -> None:
    for trust in (True, False):
        with pytest.raises(ValueError, match=r"trust_bytes needs a dcp_fast\.DefaultLoadPlanner"):
            dcp_fast.load(wanted(), checkpoint_id=refused, planner=torch_planner(), trust_bytes=trust)
    planner = torch_planner()
    with dcp_fast.install(), pytest.raises(ValueError, match="trust_bytes needs"):
        dcp_fast.load(wanted(), checkpoint_id=refused, planner=planner, trust_bytes=True)


def test_torchs_planner_is_used_as_it_is(refused: Path) -> None:
    planner = torch_planner()
    assert not refuses(dcp_fast.load, checkpoint_id=refused, planner=planner)
    with dcp_fast.install():
        assert refuses(dcp.load, checkpoint_id=refused, planner=planner)


def test_load_state_dict(refused: Path) -> None:
    arguments: dict[str, Any] = {"storage_reader": fast_reader(refused), "no_dist": True}
    assert refuses(dcp_fast.load_state_dict, **arguments)
    assert not refuses(dcp_fast.load_state_dict, planner=dcp_fast.DefaultLoadPlanner(trust_bytes=True), **arguments)


@pytest.mark.usefixtures("gloo")
def test_optimizer_state(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", {"optim": {"phase": Phase.DECAY, "betas": (0.9, 0.99), "exp_avg": torch.ones(4)}})

    def load(**arguments: Any) -> Any:
        return dcp_fast.load_sharded_optimizer_state_dict({}, "optim", fast_reader(path), **arguments)

    with pytest.raises(CheckpointException) as caught:
        load()
    assert_refused(path, caught.value.failures[0][0], [f"{__name__}.Phase"], "optim.phase")
    loaded = load(planner=dcp_fast.DefaultLoadPlanner(trust_bytes=True))["optim"]
    assert (loaded["phase"], loaded["betas"]) == (Phase.DECAY, (0.9, 0.99))
    with torch.serialization.safe_globals([Phase]):
        assert load()["optim"]["phase"] == Phase.DECAY


def test_installed(refused: Path) -> None:
    assert not refuses(dcp.load, checkpoint_id=refused)
    with dcp_fast.install():
        assert refuses(dcp.load, checkpoint_id=refused)
        assert refuses(dcp.load, checkpoint_id=refused, planner=dcp.DefaultLoadPlanner())
        assert not refuses(dcp.load, checkpoint_id=refused, trust_bytes=True)
    assert not refuses(dcp.load, checkpoint_id=refused)


def test_installed_with_trust(refused: Path) -> None:
    before = dcp_fast.DefaultLoadPlanner()
    with dcp_fast.install(trust_bytes=True):
        assert not refuses(dcp.load, checkpoint_id=refused)
        assert not refuses(dcp.load, checkpoint_id=refused, planner=dcp.DefaultLoadPlanner())
        assert refuses(dcp.load, checkpoint_id=refused, trust_bytes=False)
        assert refuses(dcp.load, checkpoint_id=refused, planner=dcp_fast.DefaultLoadPlanner(trust_bytes=False))
        assert refuses(dcp.load, checkpoint_id=refused, planner=before)
    assert refuses(dcp_fast.load, checkpoint_id=refused)


def test_switch_for_metadata(tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.ones(3)})
    with edit_metadata(tmp_path) as metadata:
        metadata.planner_data = Progress(1, [])
    make = lambda: {"t": torch.zeros(3)}  # noqa: E731
    for trust in (None, False):
        outcome = load_with(dcp_fast.load, make(), checkpoint_id=tmp_path, trust_metadata=trust)
        assert outcome.errors is not None
        assert isinstance(outcome.errors[0], dcp_fast.UntrustedMetadataError)
    outcome = load_with(dcp_fast.load, make(), checkpoint_id=tmp_path, trust_metadata=True)
    assert outcome.errors is None
    assert torch.equal(outcome.state["t"], torch.ones(3))
    with pytest.raises(ValueError, match=r"trust_metadata needs a dcp_fast\.FileSystemReader"):
        dcp_fast.load(make(), storage_reader=torch_reader(tmp_path), trust_metadata=True)


# Hooks


class Noting(dcp_fast.DefaultLoadPlanner):
    """Has a hook of its own, and notes the size of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        self.sizes.append(len(value.getvalue()))
        super().load_bytes(read_item, value)


class Resolving(dcp_fast.DefaultLoadPlanner):
    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(read_item)


class Own(dcp.DefaultLoadPlanner):
    """torch's planner with a hook that reads entries in its own way."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=False)


def test_planners_with_hooks(refused: Path) -> None:
    for planner in (Noting(), Resolving()):
        error = fast_error_of(planner, refused)
        assert_refused(refused, error, [f"{__name__}.Phase"])
    noting = Noting()
    assert not refuses(dcp_fast.load, checkpoint_id=refused, planner=noting, trust_bytes=True)
    assert noting.sizes == [span(refused, "value").length]
    state = wanted()
    dcp_fast.load(state, checkpoint_id=refused, planner=Own(False, False))
    assert state["value"] == Phase.DECAY


def fast_error_of(planner: dcp.DefaultLoadPlanner, path: Path) -> BaseException | None:
    errors = load_with(dcp_fast.load, wanted(), checkpoint_id=path, planner=planner).errors
    return None if errors is None else errors[0]


def test_our_planner_with_torchs_reader(refused: Path) -> None:
    """The planner alone does not know the file."""
    outcome = load_with(
        torch_load, wanted(), storage_reader=torch_reader(refused), planner=dcp_fast.DefaultLoadPlanner()
    )
    assert outcome.errors is not None
    error = outcome.errors[0]
    assert isinstance(error, UntrustedBytesError)
    assert (error.fqn, error.path, error.offset) == ("value", "", None)
    assert f"{__name__}.Phase" in str(error)
    outcome = load_with(
        torch_load,
        wanted(),
        storage_reader=torch_reader(refused),
        planner=dcp_fast.DefaultLoadPlanner(trust_bytes=True),
    )
    assert outcome.state["value"] == Phase.DECAY


def test_stream_that_is_not_at_its_start(tmp_path: Path) -> None:
    """A hook may have put something before the entry; what is refused is found from where the planner was to read."""
    save(tmp_path, {"value": Phase.DECAY, "t": torch.ones(3)})

    class Prefixing(dcp_fast.DefaultLoadPlanner):
        def load_bytes(self, read_item: ReadItem, value: Any) -> None:
            stream = io.BytesIO(b"prefix" + legacy_record(Phase.DECAY))
            stream.seek(6)
            super().load_bytes(read_item, stream)

    error = fast_error_of(Prefixing(), tmp_path)
    assert isinstance(error, UntrustedBytesError)
    assert f"{__name__}.Phase" in str(error)
