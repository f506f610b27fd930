"""What a pickle describes, without running it; and the few pickles that we write.

A pickle is a program for a small stack machine, which builds values and may call anything. This machine builds values
only: it knows the instructions that describe data, and where the pickle names a type or a function, it keeps the name.
Names that are not in `KNOWN_NAMES` are refused. So there is nothing here that a file could make run.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_STORAGES = (
    *("DoubleStorage", "FloatStorage", "HalfStorage", "BFloat16Storage"),
    *("LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage"),
)
KNOWN_NAMES = frozenset(
    {
        *("collections.OrderedDict", "collections.defaultdict", "argparse.Namespace", "types.SimpleNamespace"),
        *("builtins.set", "__builtin__.set", "builtins.object", "__builtin__.object", "builtins.getattr"),
        *("copyreg._reconstructor", "copy_reg._reconstructor", "_codecs.encode", "_io.BytesIO", "io.BytesIO"),
        *("builtins.list", "builtins.dict", "builtins.bytearray", "pathlib.PosixPath", "signal.Signals"),
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size", "torch.device"),
        *("torch.serialization._get_layout", "torch.strided", "torch.contiguous_format", "torch.preserve_format"),
        *("torch.storage.UntypedStorage", "torch.storage._load_from_bytes", "torch.nn.parameter.Parameter"),
        *(f"torch.{name}" for name in (*_DTYPES, *_STORAGES)),
        *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"),
        *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
        *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta"),
        )),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        *("megatron.core.enums.ModelType", "megatron.core.enums.Fp8Recipe"),
        *(f"megatron.core.transformer.enums.{name}" for name in (
            *("AttnBackend", "AttnMaskType", "AttnType", "LayerType", "ModelType", "CudaGraphScope"),
        )),
        "megatron.core.transformer.cuda_graphs.CudaGraphScope",
        "megatron.core.optimizer.optimizer_config.OptimizerConfig",
        *(f"megatron.core.rerun_state_machine.{name}" for name in (
            *("RerunMode", "RerunState", "RerunDiagnostic", "RerunErrorInjector"),
        )),
    }
)  # fmt: skip
"""What the files of Megatron-LM and of torch's distributed checkpoints name."""


@dataclass(eq=False)
class Named:
    """A type or function that a pickle names."""

    name: str


@dataclass(eq=False)
class Made:
    """What a pickle would make by calling something: its name, its arguments, and the state that it would be given."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.state[key]


@dataclass(frozen=True)
class StorageRef:
    """The memory of a tensor, kept elsewhere in the file under `key`; `kind` names torch's type of it."""

    kind: str
    key: str
    num_elements: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor in such memory."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    """Begins a run of values on the stack."""


_MARK = _Mark()


def read_pickle(data: bytes) -> Any:
    """The value that a pickle describes: dictionaries, lists, tuples, texts, numbers, `Made`, `Named`, `TensorRef`.

    Raises ValueError for an instruction or a name that files of these kinds do not hold, and for broken data.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return stack.pop()
            _step(opcode.name, argument, stack, memo)
    except (IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"it is not a pickle that torch would write: {error!r}") from None
    raise ValueError("it ends too early")


def _since_mark(stack: list[Any]) -> list[Any]:
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """One instruction."""
    if name in _CONSTANTS:
        stack.append(_CONSTANTS[name]())
    elif name in _VALUES:
        stack.append(argument)
    elif name in ("PROTO", "FRAME"):
        pass
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(memo[argument])
    elif name == "GLOBAL":
        stack.append(_named(*argument.split(" ", 1)))
    elif name == "STACK_GLOBAL":
        qualified = stack.pop()
        stack.append(_named(stack.pop(), qualified))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name in _ON_STACK:
        _ON_STACK[name](stack)
    else:
        raise ValueError(f"it holds the instruction {name}, which data do not need")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_VALUES = frozenset(
    {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)


def _named(module: str, qualified: str) -> Named:
    name = f"{module}.{qualified}"
    if name not in KNOWN_NAMES:
        raise ValueError(f"it names {name}, which is no type that files of this kind hold")
    return Named(name)


def _storage(identity: Any) -> StorageRef:
    kind, storage, key, _, num_elements = identity
    if kind != "storage" or not isinstance(storage, Named):
        raise ValueError(f"it refers to {identity!r}, which is no memory of a tensor")
    return StorageRef(storage.name, str(key), int(num_elements))


def _tuple(count: int) -> Callable[[list[Any]], None]:
    def collect(stack: list[Any]) -> None:
        values = tuple(stack[-count:])
        if len(values) < count:
            raise ValueError("it ends too early")
        del stack[-count:]
        stack.append(values)

    return collect


def _set_items(stack: list[Any], values: list[Any]) -> None:
    target = stack[-1].items if isinstance(stack[-1], Made) else stack[-1]
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[key] = value


def _set_one(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _set_items(stack, [key, value])


def _extend(stack: list[Any], values: list[Any]) -> None:
    if isinstance(stack[-1], Made):
        stack[-1].items |= dict(enumerate(values))
    else:
        stack[-1].extend(values)


def _add(stack: list[Any]) -> None:
    values = _since_mark(stack)
    stack[-1].update(values)


def _append(stack: list[Any]) -> None:
    value = stack.pop()
    _extend(stack, [value])


def _many(act: Callable[[list[Any], list[Any]], None]) -> Callable[[list[Any]], None]:
    def collect(stack: list[Any]) -> None:
        values = _since_mark(stack)
        act(stack, values)

    return collect


def _reduce(stack: list[Any]) -> None:
    arguments, function = stack.pop(), stack.pop()
    stack.append(_made(function.name, tuple(arguments)))


def _new_object(stack: list[Any]) -> None:
    arguments, kind = stack.pop(), stack.pop()
    stack.append(_made(kind.name, tuple(arguments)))


def _build(stack: list[Any]) -> None:
    state = stack.pop()
    # An ordered dictionary may carry attributes, which say nothing of its content.
    if isinstance(stack[-1], Made):
        stack[-1].state = state


def _made(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a call would make, where that is data."""
    if name in ("collections.OrderedDict", "builtins.dict"):
        pairs = arguments[0] if arguments else ()
        return dict(pairs)
    if name in ("copyreg._reconstructor", "copy_reg._reconstructor"):
        return Made(arguments[0].name, ())
    if name == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, stride = arguments[:4]
        return TensorRef(storage, int(offset), tuple(shape), tuple(stride))
    if name == "torch._utils._rebuild_parameter":
        return arguments[0]
    if name == "torch.Size":
        return tuple(arguments[0]) if arguments else ()
    return Made(name, arguments)


_ON_STACK: dict[str, Callable[[list[Any]], None]] = {
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda stack: stack.append(tuple(_since_mark(stack))),
    "LIST": lambda stack: stack.append(_since_mark(stack)),
    "SETITEM": _set_one,
    "SETITEMS": _many(_set_items),
    "APPEND": _append,
    "APPENDS": _many(_extend),
    "ADDITEMS": _add,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "BUILD": _build,
    "POP": lambda stack: stack.pop() and None,
}


def write_pickle(value: Any) -> bytes:
    """A pickle, protocol 2, of dictionaries, lists, tuples, texts, numbers, `Named`, `Made` and `TensorRef`."""
    return b"\x80\x02" + _emit(value) + b"."


def _emit(value: Any) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, dict):
        return b"}(" + b"".join(_emit(key) + _emit(entry) for key, entry in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_emit, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_emit, value)) + b"t"
    if isinstance(value, Named):
        module, _, name = value.name.rpartition(".")
        return b"c" + f"{module}\n{name}\n".encode()
    if isinstance(value, StorageRef):
        identity = ("storage", Named(value.kind), value.key, "cpu", value.num_elements)
        return _emit(identity) + b"Q"
    if isinstance(value, TensorRef):
        hooks = _emit(Named("collections.OrderedDict")) + b")R"
        fields = map(_emit, (value.storage, value.offset, value.shape, value.stride, False))
        return _emit(Named("torch._utils._rebuild_tensor_v2")) + b"(" + b"".join(fields) + hooks + b"tR"
    assert isinstance(value, Made), f"{type(value)} is nothing that we pickle"
    state = b"" if value.state is None else _emit(value.state) + b"b"
    return _emit(Named(value.name)) + _emit(value.arguments) + b"\x81" + state
