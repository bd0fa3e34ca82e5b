import pytest
import torch
from torch import nn

import fxquant
from fxquant import policies
from fxquant.backends.inductor import compile_integer
from fxquant.errors import LoweringError


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4, padding=1)

    def forward(self, x):
        x = self.conv(x).flatten(2)
        return x.transpose(1, 2) @ x


@pytest.fixture(scope="module")
def integer():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 10, 10) + 0.7
    return fxquant.compile(Tiny().eval(), [x], policies.w8a8()).lower("integer"), x


@pytest.mark.slow
def test_the_compiled_form_gives_the_integer_results(integer):
    lowered, x = integer
    compiled = compile_integer(lowered)
    torch.testing.assert_close(compiled(x), lowered(x), rtol=1e-5, atol=1e-6)
    with torch.compiler.set_stance("fail_on_recompile"):  # another batch size, the same code
        more = torch.cat([x, x[:2]])
        torch.testing.assert_close(compiled(more), lowered(more), rtol=1e-5, atol=1e-6)


def test_a_missing_compiler_is_said_plainly(integer):
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(LoweringError, match=r"needs a C\+\+ compiler and found none"),
    ):
        compile_integer(integer[0])


def test_a_failing_build_is_said_plainly(integer):
    lowered, x = integer
    torch.compiler.reset()  # forgets the code that the first test built
    # A compiler that answers and writes nothing.
    with (
        torch._inductor.config.patch({"cpp.cxx": ("true",)}),
        pytest.raises(LoweringError, match="inductor could not build"),
    ):
        compile_integer(lowered)(x)
