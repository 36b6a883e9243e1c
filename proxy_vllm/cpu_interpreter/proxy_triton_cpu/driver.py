from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    """The active driver of a machine whose kernels run in Triton's interpreter."""

    @staticmethod
    def is_active():
        return True

    def map_python_to_cpp_type(self, ty):
        raise RuntimeError("the `cpu` driver launches nothing: set TRITON_INTERPRET=1")

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_benchmarker(self):
        from triton.testing import do_bench

        return do_bench
