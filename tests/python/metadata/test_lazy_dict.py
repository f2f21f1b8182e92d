"""The dicts of metadata that is read natively are dicts to all code."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import random
import sys
import threading
from typing import Any

import pytest
import torch
from metadata_cases import assert_same_metadata, make_metadata, parse_metadata, write_metadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from dcp_fast.metadata.lazy import LazyDict, columns_of


def lazy() -> tuple[LazyDict[Any, Any], dict[Any, Any]]:
    metadata = make_metadata()
    ours = parse_metadata(pickle.dumps(metadata), "path").state_dict_metadata
    assert isinstance(ours, LazyDict)
    return ours, metadata.state_dict_metadata


OPERATIONS: dict[str, Any] = {
    "len": len,
    "bool": bool,
    "list": list,
    "dict": dict,
    "unpacked": lambda d: {**d},
    "keys": lambda d: list(d.keys()),
    "values": lambda d: list(d.values()),
    "items": lambda d: list(d.items()),
    "sorted": sorted,
    "reversed": lambda d: list(reversed(d)),
    "get": lambda d: (d.get("sharded"), d.get("absent"), d.get("absent", 5), d.get(5)),
    "in": lambda d: ("sharded" in d, "absent" in d, 5 in d, None in d),
    "key set": lambda d: (d.keys() - {"sharded"}, d.keys() & {"sharded", "absent"}, {"absent"} | d.keys()),
    "or": lambda d: d | {"new": 1},
    "ror": lambda d: {"new": 1} | d,
    "ior": lambda d: d.__ior__({"new": 1}),
    "update of a dict": lambda d: (plain := {"new": 1}, plain.update(d), plain)[2],
    "copy": lambda d: d.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
    "repr": repr,
    "set": lambda d: (d.__setitem__("sharded", 1), d.__setitem__("new", 2), list(d.items()))[2],
    "del": lambda d: (d.__delitem__("sharded"), list(d.items()))[1],
    "pop": lambda d: (d.pop("sharded"), d.pop("absent", 3), list(d)),
    "popitem": lambda d: (d.popitem(), list(d)),
    "setdefault": lambda d: (d.setdefault("sharded", 1), d.setdefault("new", 1), list(d)),
    "update": lambda d: (d.update({"new": 1}, other=2), list(d.items()))[1],
    "clear": lambda d: (d.clear(), list(d), len(d), "sharded" in d),
    "equal": lambda d: (d == make_metadata().state_dict_metadata, d == {}, make_metadata().state_dict_metadata == d),
    "unequal": lambda d: (d != make_metadata().state_dict_metadata, d != {}, d != 5),
    "fromkeys": lambda d: type(d).fromkeys(["a"], 1),
    "as a keyword": lambda d: (lambda **kwargs: kwargs)(**{k: v for k, v in d.items() if k.isidentifier()}),
    "touched out of order": lambda d: (d["zero"], d["scalar"], list(d.items()), list(d.values())),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str) -> None:
    ours, theirs = lazy()
    expected, actual = OPERATIONS[name](theirs), OPERATIONS[name](ours)
    assert actual == expected
    assert expected == actual
    if isinstance(expected, dict):
        assert list(actual.items()) == list(expected.items())
    assert list(ours.items()) == list(theirs.items())


def test_missing_keys() -> None:
    ours, _ = lazy()
    storage = parse_metadata(pickle.dumps(make_metadata()), "path").storage_data
    for key in ("absent", 5, None, ("sharded",)):
        with pytest.raises(KeyError):
            ours[key]
        with pytest.raises(KeyError):
            storage[key]
    with pytest.raises(TypeError):
        ours[[]]  # type: ignore[index]
    for index in (MetadataIndex("sharded"), MetadataIndex("sharded", [1, 0]), MetadataIndex("sharded", [0, 0, 0])):
        assert index not in storage
    for index in (MetadataIndex("sharded", [0, 1 << 70]), MetadataIndex("absent", []), MetadataIndex("scalar")):
        with pytest.raises(KeyError):
            storage[index]


def test_the_index_of_a_key_plays_no_part() -> None:
    metadata = make_metadata()
    ours = parse_metadata(pickle.dumps(metadata), "path").storage_data
    for index, info in metadata.storage_data.items():
        for hint in (None, 5):
            key = MetadataIndex(index.fqn, index.offset, hint)
            assert key in ours
            assert ours[key] == info
    assert list(ours) == list(metadata.storage_data)
    assert [key.index for key in ours] == [key.index for key in metadata.storage_data]


def test_values_are_kept() -> None:
    ours, _ = lazy()
    entry = ours["sharded"]
    entry.size = torch.Size([1])
    assert ours["sharded"] is entry
    assert ours.made("sharded")
    assert not ours.made("scalar")
    assert dict(ours)["sharded"] is entry
    assert next(value for key, value in ours.items() if key == "sharded") is entry


def test_peeking_keeps_nothing() -> None:
    ours, theirs = lazy()
    assert list(ours.peek()) == list(theirs.items())
    assert not any(map(ours.made, theirs))
    entry = ours["sharded"]
    entry.size = torch.Size([1])
    assert dict(ours.peek())["sharded"] is entry
    assert [key for key in theirs if ours.made(key)] == ["sharded"]
    ours["new"] = 5  # from here on it is a dict like any other
    assert list(ours.peek()) == [(key, ours[key]) for key in (*theirs, "new")]
    assert dict(ours.peek())["sharded"] is entry


def test_pickles_need_no_dcp_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = parse_metadata(pickle.dumps(make_metadata()), "path")
    for protocol in range(6):
        pickled = pickle.dumps(metadata, protocol)
        assert b"dcp_fast" not in pickled
        assert_same_metadata(parse_metadata(pickled, "path"), make_metadata())
    pickled = pickle.dumps(metadata)
    for name in [*sys.modules]:
        if name.partition(".")[0] == "dcp_fast":
            monkeypatch.setitem(sys.modules, name, None)  # to import it is an ImportError
    with pytest.raises(ImportError):
        import dcp_fast  # noqa: F401
    plain = pickle.loads(pickled)
    assert type(plain.state_dict_metadata) is type(plain.storage_data) is dict


def test_dataclass_functions() -> None:
    ours = parse_metadata(pickle.dumps(make_metadata()), "path")
    replaced = dataclasses.replace(ours, version="2")
    assert replaced.state_dict_metadata is ours.state_dict_metadata
    assert columns_of(replaced) is not None
    assert dataclasses.asdict(ours.state_dict_metadata["sharded"])["size"] == torch.Size([4, 1 << 40])
    assert copy.deepcopy(ours) == make_metadata()
    assert copy.copy(ours) == make_metadata()


def test_threads_that_share_metadata() -> None:
    stream = io.BytesIO()
    write_metadata(stream, 50, 40)
    metadata = parse_metadata(stream.getvalue(), "path")
    expected = pickle.loads(stream.getvalue())
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            keys = list(expected.storage_data)
            random.Random(seed).shuffle(keys)
            for key in keys:
                assert metadata.storage_data[key] == expected.storage_data[key]
            if seed % 2:
                metadata.storage_data.fill()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(metadata.storage_data.items()) == list(expected.storage_data.items())
