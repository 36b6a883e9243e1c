"""Makes Triton's interpreter about four times as fast, for tests alone.

What it saves is bookkeeping, never arithmetic:

- For every call of a jit function the interpreter redirects the builtins of triton.language again,
  and after a launch it puts them back. Here they are redirected once and stay so.
- It recomputes every integer sum in int64 to check for overflow, and drops the answer unless its
  `debug` option is set.
- Shapes and dtypes, of which a kernel has a handful, are made anew for every value.

Triton 3.6 to 3.7 behave so; a release that moves one of these names fails here, loudly.
"""

import math
from functools import cache


def install() -> None:
    import triton.language as tl
    from triton.language import core
    from triton.runtime import interpreter

    if getattr(interpreter, "quick", False):
        return
    interpreter.quick = True
    patch_language, numpy_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    assert interpreter.interpreter_builder.options.sanitize_overflow
    interpreter.interpreter_builder.options = options

    class Kept:
        def restore(self) -> None:
            pass

    patched: set[int] = set()

    def patch_once(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch_language(function)
        return Kept()

    dtypes: dict[str, object] = {}

    def known_dtype(type_):
        scalar = type_.scalar
        if isinstance(scalar, tl.pointer_type):
            return numpy_dtype(scalar)
        if scalar.name not in dtypes:
            dtypes[scalar.name] = numpy_dtype(scalar)
        return dtypes[scalar.name]

    @cache
    def known_shape(sizes: tuple[int, ...]):
        """What a type and a tensor of that shape hold: shape, count; shape, count as constexpr."""
        shape = core.tuple(sizes)
        count = core.validate_block_shape(shape) if sizes else 1
        as_constants = core.tuple([core.constexpr(size) for size in sizes])
        return shape, count, as_constants, core.constexpr(math.prod(sizes))

    def block_type(self, element_ty, shape) -> None:
        self.element_ty = element_ty
        self.shape, self.numel, _, _ = known_shape(
            tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        )

    def tensor(self, handle, type) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = tuple(type.shape.values) if type.is_block() else ()
        _, _, self.shape, self.numel = known_shape(sizes)

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = known_dtype
    core.block_type.__init__ = block_type
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tensor.__init__ = tensor
