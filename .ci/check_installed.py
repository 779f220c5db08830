"""Run away from the checkout, in an environment that has only the wheel: it imports, computes and learns."""

import fastarch.kernels
import torch

import fastarch
from fastarch import extension

assert "site-packages" in fastarch.__file__, fastarch.__file__
assert extension.cpu is not None and extension.cpu.version == fastarch.__version__
model, twin = fastarch.models.lenet5(), fastarch.models.lenet5()
twin.load_state_dict(model.state_dict())
x = torch.randn(8, 1, 32, 32)
model(x).sum().backward()
with fastarch.reference():
    twin(x).sum().backward()
for p, q in zip(model.parameters(), twin.parameters()):
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
print(f"fastarch {fastarch.__version__} with {extension.isa} kernels works from {fastarch.__file__}")
