"""Kernels for packed rows, held against float64: on a GPU, see tests/gpu."""
import torch


def agrees_with_float64(documents, attend, window, dtype):
    "Whether a kernel is there for all lengths; it, or a call for each piece, is held against `attend` in float64, gradients too."
    from medllm.models.packed_attention import pick_kernel
    q, k, v = (torch.randn(1, heads, 401, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (8, 2, 2))
    kernel = pick_kernel(q, v, 0.0)
    got = attend(q, k, v) if kernel is None else kernel(
        *(x[0].transpose(0, 1) for x in (q, k, v)), documents, window, None, 0.0)[None]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, up = attend(*exact), torch.randn_like(got)
    far = lambda a, b: ((a.double() - b).norm()/b.norm()).item()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert far(got, want) < tolerance
    for a, b in zip(torch.autograd.grad(got, (q, k, v), up), torch.autograd.grad(want, exact, up.double())):
        assert far(a, b) < tolerance
    return kernel is not None
