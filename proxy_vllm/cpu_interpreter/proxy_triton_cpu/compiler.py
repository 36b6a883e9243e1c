from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    """Satisfies Triton's discovery; every use means that a kernel escaped the interpreter."""

    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def _refuse(self, *args, **kwargs):
        raise RuntimeError("the `cpu` backend compiles nothing: set TRITON_INTERPRET=1")

    hash = parse_options = add_stages = load_dialects = get_module_map = _refuse
    get_codegen_implementation = pack_metadata = _refuse
