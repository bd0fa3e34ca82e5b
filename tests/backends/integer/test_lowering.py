import copy
import dataclasses

import pytest
import timm
import torch
from torch import nn

import fxquant
from fxquant import Granularity, Policy, Rule, TensorSpec, policies
from fxquant.backends.integer import lower_to_integer
from fxquant.backends.integer.modules import FromCodes, IntConv, IntLinear, IntMatmul, ToCodes
from fxquant.config.vocabulary import Arg, OpKind, Stage
from fxquant.errors import LoweringError
from fxquant.quantizers import Quantizer, UniformQuantizer
from tests.helpers.integer_helpers import assert_integer_equals_simulation, code_buffers, compare
from tests.helpers.refusals import refused


class Net(nn.Module):
    """Convolutions of all sorts, then attention with two heads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, dilation=2)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.grouped(torch.nn.functional.gelu(self.depthwise(self.stem(x))))
        x = x.flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = (f(x).reshape(b, n, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
        return self.head((scores @ v).transpose(1, 2).reshape(b, n, c).mean(1))


def images(count=4, size=16):
    torch.manual_seed(0)
    # Mean far from zero, so that zero_point is none of 0, 128 and 255.
    return torch.randn(count, 3, size, size) + 0.7


def build(policy, model=None, x=None):
    torch.manual_seed(0)
    model = (model or Net()).eval()
    return fxquant.compile(model, [images() if x is None else x], policy)


@pytest.fixture(scope="module")
def w8a8():
    """For tests that change nothing in it."""
    return build(policies.w8a8())


def heads():
    spec = TensorSpec(bits=8, granularity=Granularity.HEAD)
    return policies.w8a8().with_rules(Rule(op=OpKind.MATMUL, spec=spec))


def asymmetric_weights():
    spec = TensorSpec(bits=8, granularity=Granularity.CHANNEL)
    return policies.w8a8().with_rules(Rule(arg=Arg.WEIGHT, spec=spec))


def asymmetric_tensor_weights():
    return policies.w8a8().with_rules(Rule(arg=Arg.WEIGHT, spec=TensorSpec(bits=5)))


def rhs_channels():
    spec = TensorSpec(bits=8, granularity=Granularity.CHANNEL)
    return policies.w8a8().with_rules(Rule(arg=Arg.RHS, spec=spec))


POLICIES = {
    "w8a8": policies.w8a8(),
    "w4a4": policies.minmax(4, 4),
    "w3a6": policies.minmax(3, 6),
    "w16a16": policies.minmax(16, 16),
    "w8a16": policies.minmax(8, 16),
    "w12a9": policies.minmax(12, 9),
    "heads": heads(),
    "asymmetric weights": asymmetric_weights(),
    "asymmetric weights per tensor": asymmetric_tensor_weights(),
    "channels of the right operand": rhs_channels(),
}


@pytest.mark.parametrize("name", POLICIES)
def test_integer_equals_simulation(name):
    qm = build(POLICIES[name])
    lowered = qm.lower("integer")
    assert_integer_equals_simulation(qm.graph_module, lowered, images(3))
    kinds = [type(m) for m in lowered.modules()]
    assert [kinds.count(kind) for kind in (IntConv, IntLinear, IntMatmul)] == [3, 4, 2]
    assert FromCodes not in kinds


def test_a_padded_asymmetric_input_is_covered(w8a8):
    lowered = w8a8.lower("integer")
    zero = int(lowered.integer.stem.input.zero_point)
    assert 0 < zero < 255 and zero != 128


def test_the_whole_network_is_near_the_simulation(w8a8):
    qm = w8a8
    with torch.no_grad():
        simulated, out = qm(images(3)), qm.lower("integer")(images(3))
    # A tie may fall the other way and shift what comes after by a step here and there.
    assert (simulated - out).abs().max() < 0.02 * simulated.abs().max()


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64).eval()
    x = images(2, 64)
    return fxquant.compile(model, [x], policies.w8a8()), x


def test_a_vision_transformer(vit):
    qm, x = vit
    lowered = qm.lower("integer")
    assert_integer_equals_simulation(qm.graph_module, lowered, x)
    assert lowered(x[:1]).shape == (1, 1000)
    calls = [n.target for n in lowered.graph.nodes if n.op == "call_module"]
    # q, k and v read one value with one range: quantized once.
    assert calls.count("codes.blocks_0_attn_qkv__input") == 1
    assert len([c for c in calls if c.startswith("codes.")]) == 10
    assert not [n for n in lowered.graph.nodes if str(n.target).startswith("aten.linear")]


def test_weights_are_stored_once_as_codes(vit):
    qm, _ = vit
    lowered = qm.lower("integer")
    codes = code_buffers(lowered)
    assert len(codes) == 8 and all(code.dtype == torch.int8 for code in codes.values())
    floats = sum(p.numel() for p in lowered.state_dict().values() if p.is_floating_point())
    assert floats < sum(code.numel() for code in codes.values()) / 10
    assert not any(p.requires_grad for p in lowered.parameters())


def test_lowering_leaves_the_graph_alone(vit):
    qm, x = vit
    gm = qm.graph_module
    before, state, out = str(gm.graph), copy.deepcopy(gm.state_dict()), qm(x)
    lower_to_integer(gm)
    assert str(gm.graph) == before and gm.meta["stage"] is Stage.FROZEN
    for name, value in gm.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch.equal(qm(x), out)


def test_it_survives_saving_and_loading(tmp_path):
    qm = build(asymmetric_weights())
    qm.save(tmp_path)
    expected, actual = (m.lower("integer")(images(2)) for m in (qm, fxquant.load(tmp_path)))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_its_state_is_in_buffers(w8a8):
    lowered = w8a8.lower("integer")
    for module in lowered.modules():
        assert not [name for name, value in vars(module).items() if torch.is_tensor(value)]
    assert all(value.is_meta for value in lowered.to("meta").state_dict().values())


def test_weight_only_products_run_float_on_dequantized_weights():
    rules = (Rule(arg=Arg.WEIGHT, spec=TensorSpec(bits=4, symmetric=True)),)
    qm = build(Policy(name="weights", rules=rules))
    lowered = qm.lower("integer")
    kinds = {type(m) for m in lowered.modules()}
    assert FromCodes in kinds and not kinds & {IntConv, IntLinear, IntMatmul, ToCodes}
    assert len(code_buffers(lowered)) == 7
    assert torch.equal(lowered(images()), qm(images()))


def test_a_value_shared_with_a_float_product_is_quantized_once():
    # k's weight stays float: its product reads the values of the codes that q and v read.
    keep = Rule(path="k", arg=Arg.WEIGHT, spec=None)
    qm = build(policies.minmax(8, 8).with_rules(keep))
    lowered = qm.lower("integer")
    kinds = [type(m) for m in lowered.modules()]
    assert kinds.count(IntLinear) == 3 and kinds.count(FromCodes) == 1
    readers = [n for n in lowered.graph.nodes if str(n.target) == "codes.q__input"]
    assert len(readers) == 1 and len(readers[0].users) == 3
    assert_integer_equals_simulation(qm.graph_module, lowered, images(2))


class Shapes(nn.Module):
    """1d and 3d convolutions, a padding that is not symmetric, a tied weight, a computed bias."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(3, 4, 4, padding="same", dilation=2)
        self.cube = nn.Conv3d(3, 4, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1))
        self.tied = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        line = self.line(x.flatten(2)).mean(-1)
        cube = self.cube(x.unflatten(3, (4, 4))).flatten(2).mean(-1)
        y = self.tied(torch.relu(self.tied(line + cube)))
        return torch.nn.functional.linear(y, self.tied.weight, self.shift.sigmoid() * y.amax())


def test_other_shapes_of_products():
    qm = build(policies.minmax(8, 8), Shapes())
    lowered = qm.lower("integer")
    assert_integer_equals_simulation(qm.graph_module, lowered, images(3))
    kinds = [type(m) for m in lowered.modules()]
    assert kinds.count(IntConv) == 2 and kinds.count(IntLinear) == 3
    assert len([n for n in code_buffers(lowered) if n.startswith("tied")]) == 1
    with_float_bias = [
        n for n in lowered.graph.nodes if str(n.target).startswith("integer.") and len(n.args) == 3
    ]
    assert len(with_float_bias) == 1


def replace_quantizer(gm, name, **changes):
    old = gm.get_submodule(name)
    settings = {"bits": old.bits, "signed": old.signed, "axis": old.axis}
    parameters = {"scale": old.scale, "zero_point": old.zero_point}
    parameters |= {k: v for k, v in changes.items() if k in parameters}
    settings |= {k: v for k, v in changes.items() if k in settings}
    gm.set_submodule(name, UniformQuantizer(**parameters, **settings))


def test_a_bias_far_larger_than_its_weights_stays_exact():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)
            with torch.no_grad():
                self.fc.bias.fill_(1e6)

        def forward(self, x):
            return self.fc(x.mean(1))

    model = Large()
    qm = build(policies.minmax(8, 8), model, images() * 1e-3)
    lowered = qm.lower("integer")
    assert lowered.integer.fc.bias_codes is not None
    assert_integer_equals_simulation(qm.graph_module, lowered, images() * 1e-3)


@pytest.mark.parametrize(
    ("edge", "channels", "axis", "message"),
    [
        ("q__input", 16, -1, "the sum runs over it"),
        ("matmul__lhs", 8, -1, "the sum runs over it"),
        ("matmul__rhs", 8, -2, "the sum runs over it"),
        ("matmul__lhs", 2, 1, "counted from the last"),
        ("stem__input", 3, 1, "one scale for its input"),
        ("q__weight", 16, 1, "one a row"),
    ],
)
def test_a_scale_that_does_not_factor_out_is_refused(w8a8, edge, channels, axis, message):
    gm = copy.deepcopy(w8a8.graph_module)
    ones = torch.ones(channels)
    replace_quantizer(gm, f"quant.{edge}", scale=ones, zero_point=ones, signed=False, axis=axis)
    with refused(LoweringError, f"^{edge} .*{message}", edge=edge, got=axis):
        lower_to_integer(gm)


class Rounded(Quantizer):
    """A quantizer that is not uniform, as far as the backend knows."""

    type_name = "rounded"
    bits = 8

    def quantize(self, x):
        return x.round()

    def dequantize(self, codes):
        return codes

    def forward(self, x):
        return x.round()

    def config(self):
        return {"type": self.type_name}

    @classmethod
    def from_config(cls, config):
        return cls()


def test_a_quantizer_that_is_not_uniform_is_refused(w8a8):
    gm = copy.deepcopy(w8a8.graph_module)
    gm.set_submodule("quant.matmul__lhs", Rounded())
    text = r"matmul__lhs.*has no form of Rounded"
    with refused(LoweringError, text, edge="matmul__lhs", got="Rounded"):
        lower_to_integer(gm)


def test_a_quantizer_that_is_not_uniform_stays_on_a_float_product():
    qm = build(policies.w8a8().with_rules(Rule(path="head", arg=Arg.WEIGHT, spec=None)))
    qm.graph_module.set_submodule("quant.head__input", Rounded())
    lowered = qm.lower("integer")
    assert isinstance(lowered.quant.head__input, Rounded)
    assert_integer_equals_simulation(qm.graph_module, lowered, images(2))


def test_the_wrong_stage_is_refused(w8a8):
    gm = copy.deepcopy(w8a8.graph_module)
    gm.meta["stage"] = Stage.OBSERVED
    text = "stage FROZEN, got OBSERVED"
    with refused(LoweringError, text, got=Stage.OBSERVED, expected=Stage.FROZEN):
        lower_to_integer(gm)
    with refused(LoweringError, "stage FROZEN, got none", got=None, expected=Stage.FROZEN):
        lower_to_integer(torch.fx.symbolic_trace(nn.Linear(2, 2)))


def test_the_comparison_notices_a_wrong_code(w8a8):
    qm = w8a8
    lowered = qm.lower("integer")
    lowered.integer.stem.weight.scale.mul_(1.02)
    _, _, differences = compare(qm.graph_module, lowered, images())
    worst = max(differences, key=lambda d: d.count / d.entries)
    assert worst.where == "quant.depthwise__input" and worst.tie > 1e-3
    assert dataclasses.asdict(worst)["count"] > worst.entries / 1000
