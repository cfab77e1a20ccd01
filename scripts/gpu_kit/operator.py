"""Call the compiled operator as MXNet does, through its library's C functions, without MXNet.

Needs the library and ctypes, nothing else of this repository: it also runs where a GPU is and
MXNet is not.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Callable, NamedTuple

TYPES = {"float32": 0, "float64": 1, "float16": 2}
DEFAULTS: dict[str, Any] = {
    "axis": 1,
    "epsilon": 1e-5,
    "momentum": 0.9,
    "scale": True,
    "center": True,
    "relu": False,
    "unbiased_variance": False,
}

_MALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_STRINGS = ctypes.POINTER(ctypes.c_char_p)


class Tensor(NamedTuple):
    """An array in the memory of a device."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str


class Operator:
    """The operator in a library.

    Parameters
    ----------
    library : Path
        What ``python -m scratchbn build-native`` makes.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        pointers = [ctypes.c_void_p() for _ in range(5)]
        lists = [ctypes.POINTER(ctypes.c_void_p)() for _ in range(3)]
        contexts = [_STRINGS() for _ in range(3)]
        counts = [ctypes.c_int() for _ in range(3)]
        name, subgraph = ctypes.c_char_p(), ctypes.c_int()
        of_kinds = [ctypes.byref(part) for parts in zip(contexts, lists, counts) for part in parts]
        self._library._opRegGet(
            0,
            ctypes.byref(name),
            ctypes.byref(subgraph),
            *of_kinds,
            *map(ctypes.byref, pointers),
        )
        self.name = (name.value or b"").decode()
        self._parse, self._infer_type, _, self._infer_shape, self._mutate = pointers
        self._compute = {
            (kind, contexts[i][j].decode()): ctypes.c_void_p(lists[i][j])
            for i, kind in enumerate(("forward", "backward"))
            for j in range(counts[i].value)
        }

    def add_image(self, capability: int, image: bytes) -> None:
        """Hand over a cubin or PTX for cards of a compute capability, 86 for 8.6."""
        self._library.scratchbn_gpu_add_image(capability, image, ctypes.c_size_t(len(image)))

    def open(self, device: int = 0) -> None:
        """Load the kernels into a device; RuntimeError says why that failed."""
        reason = ctypes.create_string_buffer(1024)
        if self._library.scratchbn_gpu_open(device, reason, ctypes.c_size_t(len(reason))):
            raise RuntimeError(reason.value.decode())

    def arity(self, options: dict[str, Any]) -> tuple[int, int]:
        """Return how many inputs MXNet is shown, and how many outputs there are."""
        inputs, outputs = ctypes.c_int(), ctypes.c_int()
        _check(
            "ParseAttrs",
            self._library._opCallParseAttrs(
                self._parse, *_attributes(options), ctypes.byref(inputs), ctypes.byref(outputs)
            ),
        )
        return inputs.value, outputs.value

    def output_types(self, dtype: str) -> list[str]:
        """Return the types of the outputs for data of a type."""
        types = (ctypes.c_int * 1)(TYPES[dtype])
        out = (ctypes.c_int * 3)()
        function = self._library._opCallInferType
        _check(
            "InferType", function(self._infer_type, *_attributes({"half": True}), types, 1, out, 3)
        )
        names = {number: name for name, number in TYPES.items()}
        return [names[number] for number in out]

    def output_shapes(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[tuple]:
        """Return the shapes of the outputs for data of a shape."""
        row = ctypes.POINTER(ctypes.c_uint)
        given = (row * 1)(ctypes.cast((ctypes.c_uint * len(shape))(*shape), row))
        ranks = (ctypes.c_int * 1)(len(shape))
        rows = ctypes.POINTER(row)
        changed, out = rows(), rows()
        changed_ranks, out_ranks = ctypes.POINTER(ctypes.c_int)(), ctypes.POINTER(ctypes.c_int)()
        function = self._library._opCallInferShape
        status = function(
            self._infer_shape, *_attributes(options), given, ranks, 1,
            ctypes.byref(changed), ctypes.byref(changed_ranks),
            ctypes.byref(out), ctypes.byref(out_ranks), 3,
        )  # fmt: skip
        _check("InferShape", status)
        shapes = [tuple(out[i][: out_ranks[i]]) for i in range(3)]
        for block in (*(out[i] for i in range(3)), changed[0]):
            self._library._opCallFree(ctypes.cast(block, ctypes.c_void_p))
        for block in (out, out_ranks, changed, changed_ranks):
            self._library._opCallFree(ctypes.cast(block, ctypes.c_void_p))
        return shapes

    def mutated(self, options: dict[str, Any]) -> list[int]:
        """Return which inputs the operator writes to."""
        indices, count = ctypes.POINTER(ctypes.c_int)(), ctypes.c_int()
        function = self._library._opCallMutateInputs
        status = function(
            self._mutate, *_attributes(options), ctypes.byref(indices), ctypes.byref(count)
        )
        _check("MutateInputs", status)
        found = indices[: count.value]
        self._library._opCallFree(ctypes.cast(indices, ctypes.c_void_p))
        return found

    def compute(
        self,
        kind: str,
        inputs: list[Tensor],
        outputs: list[Tensor],
        options: dict[str, Any],
        allocate: Callable[[int], int],
        stream: int = 0,
        on: tuple[str, int] = ("gpu", 0),
    ) -> None:
        """Compute, or on a GPU, put the work on a stream.

        Parameters
        ----------
        kind : {'forward', 'backward'}
        inputs, outputs : list of Tensor
            A backward's inputs are the gradients of the outputs, the inputs and the outputs of the
            forward; its outputs the gradients of the inputs.
        options : dict
            Those of the operator that differ from `DEFAULTS`.
        allocate : callable
            Takes a number of bytes, returns a pointer to memory of the device that stays until
            the work is done.
        stream : int
            A CUDA stream.
        on : tuple of str and int
            The kind of device and its number.

        Raises
        ------
        RuntimeError
            If the operator fails.
        """
        malloc = _MALLOC(lambda _, size: allocate(size))
        status = self._library._opCallFCompute(
            self._compute[kind, on[0]], *_attributes(options),
            *_described(inputs, on), *_described(outputs, on),
            malloc, None, malloc, None, ctypes.c_void_p(stream), None, None,
            _dense(inputs), _dense(outputs),
            *[None] * 10,
        )  # fmt: skip
        _check(f"FCompute, {kind}", status)


def _attributes(options: dict[str, Any]) -> tuple[Any, Any, int]:
    chosen = {**DEFAULTS, **options}
    extra = 6 if chosen["momentum"] is None else 5
    texts = {**chosen, "__ext_extra_inputs__": extra}
    keys = [key.encode() for key in texts]
    values = [str(value).encode() for value in texts.values()]
    make = ctypes.c_char_p * len(texts)
    return make(*keys), make(*values), len(texts)


def _described(tensors: list[Tensor], on: tuple[str, int]) -> tuple[Any, ...]:
    """Return the arguments that describe arrays: shapes, ranks, pointers, types, devices."""
    n = len(tensors)
    row = ctypes.POINTER(ctypes.c_int64)
    shapes = [(ctypes.c_int64 * max(len(t.shape), 1))(*t.shape) for t in tensors]
    return (
        (row * n)(*(ctypes.cast(shape, row) for shape in shapes)),
        (ctypes.c_int * n)(*(len(t.shape) for t in tensors)),
        (ctypes.c_void_p * n)(*(t.pointer or None for t in tensors)),
        (ctypes.c_int * n)(*(TYPES[t.dtype] for t in tensors)),
        (ctypes.c_size_t * n)(),
        (ctypes.c_char_p * n)(*[on[0].encode()] * n),
        (ctypes.c_int * n)(*[on[1]] * n),
        n,
    )


def _dense(tensors: list[Tensor]) -> Any:
    return (ctypes.c_int * len(tensors))()


def _check(function: str, status: int) -> None:
    if not status:
        raise RuntimeError(f"the operator failed in {function}")
