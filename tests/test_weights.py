from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, state_dicts
from torch import Tensor, nn
from torch.testing import assert_close

from calrobust import average, interpolate, model_stock

State = dict[str, Tensor]


def assert_new(result: State, *inputs: State) -> None:
    """The result is a dict whose tensors share no memory with the inputs'."""
    taken = {value.untyped_storage().data_ptr() for state in inputs for value in state.values()} - {0}  # 0: empty
    assert type(result) is dict
    assert not any(value.requires_grad for value in result.values())
    assert taken.isdisjoint(value.untyped_storage().data_ptr() for value in result.values())


@given(state_dicts(2), st.floats(0, 1))
def test_interpolation_is_the_line_between_two_models(models: list[State], alpha: float) -> None:
    """Floats are (1 − α) θ₀ + α θ₁, integers the fine-tuned model's, and the inputs stay as they are (trap 33)."""
    before = [{name: value.clone() for name, value in model.items()} for model in models]
    result = interpolate(models[0], models[1], alpha)
    assert list(result) == list(models[0])
    assert_close(result["weight"], (1 - alpha) * models[0]["weight"] + alpha * models[1]["weight"])
    assert torch.equal(result["count"], models[1]["count"])
    assert torch.equal(result["used"], models[1]["used"])
    assert_close(models, before, rtol=0, atol=0)
    assert_new(result, *models)


@given(state_dicts(2))
def test_the_ends_of_the_line_are_the_models(models: list[State]) -> None:
    """They are exact, also beside a model that has diverged, where 0 * inf would be NaN."""
    for alpha, model in enumerate(models):
        assert torch.equal(interpolate(models[0], models[1], alpha)["weight"], model["weight"])
        ends = [{"weight": torch.full_like(model["weight"], torch.inf)}] * 2
        ends[alpha] = {"weight": model["weight"]}
        assert torch.equal(interpolate(ends[0], ends[1], alpha)["weight"], model["weight"])


@given(seeds(), st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_alpha_may_be_a_function_of_the_name_and_leave_the_line(seed: int, alphas: list[float]) -> None:
    """Each tensor is (1 − α) θ₀ + α θ₁ at its own α; integers do not ask for one, and wrappers' words are left out."""
    generator = torch.Generator().manual_seed(seed)
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    zero_shot, fine_tuned = (
        {name: torch.randn(3, generator=generator, dtype=torch.float64) for name in names} for _ in range(2)
    )
    given, asked = dict(zip(names, alphas, strict=True)), []

    def alpha(name: str) -> float:
        asked.append(name)
        return given[name]

    wrapped = {f"module.{name}": value for name, value in zero_shot.items()} | {"module.n": torch.tensor(1)}
    result = interpolate(wrapped, {**fine_tuned, "n": torch.tensor(2)}, alpha, extrapolate=True)
    assert sorted(asked) == sorted(names)
    assert result.pop("module.n") == 2
    for name in names:
        expected = (1 - given[name]) * zero_shot[name] + given[name] * fine_tuned[name]
        assert_close(result[f"module.{name}"], expected, rtol=1e-12, atol=1e-12)
        alone = interpolate({"w": zero_shot[name]}, {"w": fine_tuned[name]}, given[name], extrapolate=True)
        assert torch.equal(alone["w"], result[f"module.{name}"])


def test_lines_scales_each_layer_by_its_depth() -> None:
    """θ₀ + (α + β(l − 1)/(L − 1))(θ − θ₀) at layer l of L; a layer with α = 0 or 1 is one of the two, bit for bit."""
    zero_shot, fine_tuned = (nn.Sequential(*(nn.Linear(2, 2).double() for _ in range(5))) for _ in range(2))
    with torch.no_grad():
        fine_tuned.get_parameter("0.weight")[0, 0] = torch.inf  # of which the first layer takes nothing
    result = interpolate(zero_shot, fine_tuned, lambda name: int(name.split(".")[0]) / 4)  # α = 0, β = 1
    start, end = zero_shot.state_dict(), fine_tuned.state_dict()
    for layer in range(5):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            expected = start[name] + layer / 4 * (end[name] - start[name]) if layer else start[name]
            assert_close(result[name], expected, rtol=0 if layer in (0, 4) else 1e-12, atol=1e-15 if layer else 0)
    assert torch.equal(result["0.weight"], start["0.weight"])
    assert torch.equal(result["4.weight"], end["4.weight"])


@given(seeds(), st.lists(st.floats(0, 100) | st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_a_weighted_average_is_its_formula(seed: int, weights: list[float]) -> None:
    """Σ wₖ θₖ / Σ wₖ, from generators too; a model of weight 0 takes no part, so it may have diverged."""
    generator = torch.Generator().manual_seed(seed)
    models = [{"w": torch.randn(4, generator=generator, dtype=torch.float64), "n": torch.tensor(k)} for k in range(6)]
    models = models[: len(weights)]
    for model, weight in zip(models, weights, strict=True):
        if weight == 0:
            model["w"].fill_(torch.nan)
    expected = sum(
        (w * m["w"] for w, m in zip(weights, models, strict=True) if w), torch.zeros(4, dtype=torch.float64)
    ) / sum(weights)
    result = average((model for model in models), (weight for weight in weights))
    assert_close(result["w"], expected, rtol=1e-12, atol=1e-12)
    assert result["n"] == max(k for k, weight in enumerate(weights) if weight)


@given(st.integers(1, 6).flatmap(state_dicts), st.floats(1e-300, 1e300) | st.just(1.7e308))
def test_equal_weights_are_no_weights(models: list[State], weight: float) -> None:
    """Only their ratios count, whatever their size, and halves meet on the line."""
    assert_close(average(models, [weight] * len(models)), average(models), rtol=1e-12, atol=1e-12)
    between = average([models[0], models[-1]], [weight, weight])
    assert_close(between["weight"], interpolate(models[0], models[-1], 0.5)["weight"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [int, float, np.float16, np.int64])
def test_weights_are_numbers_of_any_kind(kind: type[Any]) -> None:
    """Their ratio is computed in float64, and a low-precision model is rounded once."""
    models = [{"w": torch.full((2,), value, dtype=torch.bfloat16)} for value in (1.0, 7.0)]
    assert torch.equal(average(models, [kind(2), kind(1)])["w"], torch.full((2,), 3.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("alpha", [0, 1])
def test_the_ends_of_a_line_that_overflows_are_the_models(alpha: int) -> None:
    """The difference of the two is infinite, and 0 * inf would be NaN; negative zeros keep their sign."""
    ends = [{"w": torch.tensor([3e38, -0.0])}, {"w": torch.tensor([-3e38, -0.0])}]
    result = interpolate(ends[0], ends[1], alpha)["w"]
    assert torch.equal(result, ends[alpha]["w"])
    assert result.signbit().tolist() == ends[alpha]["w"].signbit().tolist()


@given(st.integers(1, 6).flatmap(state_dicts))
def test_an_average_is_the_mean_of_its_models(models: list[State]) -> None:
    """Floats are averaged, and integers are the last model's (trap 33)."""
    result = average(models)
    assert_close(result["weight"], torch.stack([model["weight"] for model in models]).mean(0))
    assert torch.equal(result["count"], models[-1]["count"])
    assert_new(result, *models)


@given(state_dicts(2))
def test_the_average_of_two_models_is_the_middle_of_their_line(models: list[State]) -> None:
    """Soup and WiSE-FT meet at one half."""
    assert_close(average(models), interpolate(models[0], models[1], 0.5))


@given(state_dicts(2), st.floats(0, 1))
def test_the_line_stays_between_its_ends_and_can_be_walked_backwards(models: list[State], alpha: float) -> None:
    """Every weight lies between the two it comes from; 1 − α from the other end is the same model."""
    first, second = (model["weight"] for model in models)
    between = interpolate(models[0], models[1], alpha)["weight"]
    assert torch.all((torch.minimum(first, second) <= between) & (between <= torch.maximum(first, second)))
    assert_close(interpolate(models[1], models[0], 1 - alpha)["weight"], between, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_averages_of_averages_are_averages(groups: int, each: int, data: st.DataObject) -> None:
    """This holds for groups of one size, and for lines through averages."""
    models = data.draw(state_dicts(groups * each))
    whole = average(models)["weight"]
    parts = [average(models[k * each : (k + 1) * each]) for k in range(groups)]
    assert_close(average(parts)["weight"], whole, rtol=1e-12, atol=1e-12)
    halves = average([interpolate(models[0], model, 0.5) for model in models])["weight"]
    assert_close(halves, interpolate(models[0], average(models), 0.5)["weight"], rtol=1e-12, atol=1e-12)


def stock(start: Tensor, models: list[Tensor]) -> Tensor:
    """Model Stock from the angles of all pairs, in float64, without clamping."""
    differences = [(model - start).flatten().double() for model in models]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.combinations(differences, 2)]
    k, cosine = len(models), sum(cosines) / len(cosines)
    t = k * cosine / (1 + (k - 1) * cosine)
    return t * sum(models, torch.zeros_like(start)) / k + (1 - t) * start


@given(st.integers(2, 5), seeds())
def test_model_stock_is_its_formula_for_each_tensor(k: int, seed: int) -> None:
    """Its t is K cos φ / (1 + (K − 1) cos φ), with an angle of its own for every tensor."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    pretrained = {"a": draw(3, 4), "b": draw(5)}
    models = [{name: value + draw(*value.shape) for name, value in pretrained.items()} for _ in range(k)]
    result = model_stock(pretrained, models)
    for name, value in pretrained.items():
        assert_close(result[name], stock(value, [model[name] for model in models]), rtol=1e-12, atol=1e-12)


@given(st.integers(2, 5), st.floats(0.1, 10), seeds())
def test_model_stock_follows_the_scale_of_the_differences(k: int, scale: float, seed: int) -> None:
    """Angles do not change with their length: θ₀ + s·δ gives θ₀ + s·(stock − θ₀)."""
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(k)]
    start = torch.ones(6, dtype=torch.float64)
    unscaled, scaled = (
        model_stock({"w": start}, [{"w": start + s * delta} for delta in deltas])["w"] - start for s in (1.0, scale)
    )
    assert_close(scaled, scale * unscaled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([[2.0, 0.0], [2.0, 0.0]], [2.0, 0.0]),
        ([[2.0, 0.0], [0.0, 2.0]], [0.0, 0.0]),
        ([[2.0, 0.0], [-2.0, 0.0]], [0.0, 0.0]),
        ([[2.0, 0.0], [-1.0, 0.5]], [0.0, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        ([[2.0, 0.0], [2.0, 0.0], [0.0, 0.0]], [0.8, 0.0]),  # cosines 1, 0, 0: t = 1 / (1 + 2/3), of the mean 4/3
    ],
    ids=["equal", "orthogonal", "opposite", "obtuse", "unchanged", "one unchanged"],
)
def test_model_stock_trusts_models_as_far_as_they_agree(models: list[list[float]], expected: list[float]) -> None:
    """Equal models give their mean; orthogonal, opposed and unmoved ones give the pre-trained model, never NaN."""
    result = model_stock({"w": torch.zeros(2)}, [{"w": torch.tensor(w)} for w in models])
    assert_close(result["w"], torch.tensor(expected))


def test_model_stock_copies_integers_of_the_last_model() -> None:
    """A counter has no angle (trap 33)."""
    models = [{"count": torch.tensor(n)} for n in (5, 7)]
    assert model_stock({"count": torch.tensor(0)}, models) == {"count": torch.tensor(7)}


COMBINATIONS: dict[str, Callable[[Any, Any], State]] = {
    "interpolate": lambda a, b: interpolate(a, b, 0.5),
    "average": lambda a, b: average([a, b]),
    "model_stock": lambda a, b: model_stock(a, [b, b]),
}
combinations = pytest.mark.parametrize("combine", COMBINATIONS.values(), ids=COMBINATIONS)


@combinations
def test_modules_and_state_dicts_are_taken_alike(combine: Callable[[Any, Any], State]) -> None:
    """They may be mixed, and the result loads strictly, with BatchNorm's counter."""
    first, second = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2))
    second(torch.randn(4, 2))
    from_modules = combine(first, second)
    assert_close(from_modules, combine(first, second.state_dict()), rtol=0, atol=0)
    assert_new(from_modules, dict(first.state_dict()), dict(second.state_dict()))
    assert from_modules["1.num_batches_tracked"] == 1
    first.load_state_dict(from_modules)


@combinations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_kept(combine: Callable[[Any, Any], State], dtype: torch.dtype) -> None:
    """The arithmetic is float32 or better: the value is that of float32 inputs, rounded once."""
    models = [{"w": torch.rand(50).to(dtype)} for _ in range(2)]
    precise = combine(*({"w": model["w"].to(torch.promote_types(dtype, torch.float32))} for model in models))
    result = combine(*models)["w"]
    assert result.dtype == dtype
    assert torch.equal(result, precise["w"].to(dtype))


@combinations
def test_an_attention_mask_stays(combine: Callable[[Any, Any], State]) -> None:
    """A value that all models have is kept, even −inf, where a difference would be NaN."""
    mask = torch.tensor([0.0, -torch.inf])
    assert torch.equal(combine({"mask": mask}, {"mask": mask.clone()})["mask"], mask)


@combinations
def test_extra_state_is_a_copy_of_the_last_models(combine: Callable[[Any, Any], State]) -> None:
    """What ``get_extra_state`` gives need not be a tensor; tensors are no weights, and may be of any length."""
    for states in ({"n": 1}, {"n": 2}), (torch.ones(2), torch.zeros(2)), (torch.ones(2).byte(), torch.ones(3).byte()):
        first, second = ({"a._extra_state": cast(Any, state)} for state in states)
        result = combine(first, second)
        assert_close(result, second, rtol=0, atol=0)
        assert result["a._extra_state"] is not second["a._extra_state"]


class Mixed(nn.Module):
    """Has a parameter, statistics, and a buffer that is neither."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.norm = nn.BatchNorm1d(1)
        self.norm.running_var.fill_(value)  # type: ignore[union-attr]  # it tracks them
        self.register_buffer("queue", torch.full((2,), value))


@combinations
def test_a_module_tells_buffers_from_parameters(combine: Callable[[Any, Any], State]) -> None:
    """Its buffers that are not statistics are the last model's; of plain state dicts all floats are combined."""
    told, untold = combine(Mixed(1.0), Mixed(3.0)), combine(Mixed(1.0).state_dict(), Mixed(3.0).state_dict())
    assert torch.equal(told["queue"], torch.full((2,), 3.0))
    for name in ("weight", "norm.running_var"):
        assert torch.equal(told[name], untold[name])
    assert torch.equal(untold["queue"], untold["weight"])
    assert_close(combine(Mixed(1.0).state_dict(), Mixed(3.0)), told, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old form is deprecated
@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("as_dicts", [False, True])
def test_vectors_of_spectral_norm_are_the_last_models(
    spectral_norm: Callable[[nn.Module], Any], as_dicts: bool
) -> None:
    """Their mean would not have norm 1, in either of the two forms that torch has (trap 37)."""
    models = [spectral_norm(nn.Linear(8, 8)) for _ in range(2)]
    result = average([model.state_dict() if as_dicts else model for model in models])
    last = models[1].state_dict()
    vectors = [name for name in result if name.endswith(("_u", "_v"))]
    assert len(vectors) == 2
    assert all(torch.equal(result[name], last[name]) for name in vectors)
    assert not torch.equal(result["bias"], last["bias"])


@combinations
def test_what_is_not_finite_somewhere_is_the_last_models(combine: Callable[[Any, Any], State]) -> None:
    """This holds for each element, and does not change the others."""
    inf, nan = torch.inf, torch.nan
    first = torch.tensor([1.0, inf, -inf, nan, 1.0, -inf])
    last = torch.tensor([3.0, 3.0, 3.0, 3.0, nan, inf])
    result = combine({"w": first}, {"w": last})["w"]
    assert torch.equal(result[1:4], last[1:4])
    assert result[4].isnan()
    assert result[5] == inf
    assert torch.equal(result[:1], combine({"w": first[:1]}, {"w": last[:1]})["w"])


@combinations
def test_wrappers_words_are_left_out_of_names(combine: Callable[[Any, Any], State]) -> None:
    """DDP, torch.compile and checkpointing add them anywhere; the result has the names of the first model."""
    first, second = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    expected = combine(first, second)
    words = ("module.", "_orig_mod.", "module._orig_mod.", "_checkpoint_wrapped_module.")
    for word in words:
        front, middle = (
            {word + name: value for name, value in second.state_dict().items()},
            {name.replace(".", f".{word}"): value for name, value in second.state_dict().items()},
        )
        for wrapped in (front, middle):
            assert_close(combine(first, wrapped), expected, rtol=0, atol=0)
        wrapped = {word + name: value for name, value in first.state_dict().items()}
        assert list(combine(wrapped, second)) == list(wrapped)
    compiled = cast(nn.Module, torch.compile(second))
    assert_close(combine(first, compiled), expected, rtol=0, atol=0)


def test_generators_are_taken() -> None:
    """Checkpoints may be loaded one after the other."""
    states = [{"w": torch.tensor([float(n)])} for n in (1, 2, 6)]
    assert average(iter(states)) == {"w": torch.tensor([3.0])}
    assert_close(model_stock(states[0], (state for state in states)), model_stock(states[0], states))


@pytest.mark.parametrize("as_dicts", [False, True])
def test_a_generator_may_load_every_model_into_one(as_dicts: bool) -> None:
    """Its memory then holds the last; each is averaged as it was when it was yielded (trap 51)."""
    model = nn.Linear(1, 1, bias=False)

    def loaded() -> Iterator[Any]:
        for value in (1.0, 2.0, 6.0):
            nn.init.constant_(model.weight, value)
            yield model.state_dict() if as_dicts else model

    class Loads:
        def __iter__(self) -> Iterator[Any]:
            return loaded()

    for models in (loaded, Loads):
        assert average(models()) == {"weight": torch.tensor([[3.0]])}
        assert_close(model_stock({"weight": torch.zeros(1, 1)}, models()), {"weight": torch.tensor([[3.0]])})


def test_a_mean_of_large_numbers_is_finite() -> None:
    """As of the masks of a float32 and a bfloat16 model. No cosine is above 1, also of squares that underflow."""
    low, lower = (torch.tensor([float(torch.finfo(dtype).min)]) for dtype in (torch.float32, torch.bfloat16))
    expected = {"mask": low / 2 + lower / 2}
    assert_close(average([{"mask": low}, {"mask": lower}]), expected, rtol=1e-6, atol=0)
    assert_close(
        model_stock({"mask": torch.zeros(1)}, [{"mask": low}, {"mask": lower}])["mask"].isfinite().all(),
        torch.tensor(True),
    )
    tiny = [{"w": torch.tensor([1e-24, x])} for x in (0.0, 1e-24)]
    assert model_stock({"w": torch.zeros(2)}, tiny)["w"][0] <= 1.0001e-24


class Packed(Tensor):
    """A wrapper like torchao's: it is floating outside and holds integers."""

    @staticmethod
    def __new__(cls: type[Packed], data: Tensor) -> Packed:
        """Of the shape of ``data``."""
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """No arithmetic."""
        raise NotImplementedError


def quantised(kind: str, shift: int) -> Any:
    """A weight of small numbers, in one of the forms in use."""
    values = torch.arange(6).view(2, 3) + shift
    make: dict[str, Callable[[], Any]] = {
        "int8": lambda: values.to(torch.int8),
        "int8 vector": lambda: values.flatten().to(torch.int8),
        "uint8": lambda: values.to(torch.uint8),
        "int32": lambda: values.int(),
        "qint8": lambda: torch.quantize_per_tensor(values.float(), 1.0, 0, torch.qint8),
        "subclass": lambda: Packed(values),
        "uint4": lambda: values.to(torch.uint8).view(getattr(torch, "uint4")),  # noqa: B009  (not in its stubs)
    }
    return make[kind]()


@combinations
@pytest.mark.parametrize("kind", ["int8", "int8 vector", "uint8", "int32", "qint8", "subclass", "uint4"])
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")  # deprecated, and still saved in files
def test_quantised_weights_are_refused(combine: Callable[[Any, Any], State], kind: str) -> None:
    """Integers cannot be averaged apart from their scales (trap 39)."""
    models = [{"weight": quantised(kind, shift), "scale": torch.tensor(1.0 + shift)} for shift in range(2)]
    with pytest.raises(TypeError, match=r"\['weight'\] must not be quantised, because integers cannot be averaged"):
        combine(*models)


@combinations
def test_integers_that_are_no_weights_are_taken(combine: Callable[[Any, Any], State]) -> None:
    """Positions, masks in eight bits that agree, the flag of an observer, and counters are no weights."""
    first, last = (
        {
            "positions": torch.arange(6).view(2, 3),
            "mask": torch.ones(2, 2, dtype=torch.uint8),
            "enabled": torch.tensor([flag], dtype=torch.uint8),
            "uses": torch.arange(3, dtype=torch.int32) * flag,
            "codes": torch.arange(4).view(2, 2) * flag,
        }
        for flag in (0, 1)
    )
    assert_close(combine(first, last), last)


def test_half_precision_models_do_not_overflow_in_the_mean() -> None:
    """Two float16 weights of 60,000 sum to more than float16 holds; their mean does not."""
    state = {"w": torch.full((2,), 60000.0, dtype=torch.float16)}
    assert torch.equal(average([state, state])["w"], state["w"])


@combinations
def test_other_names_or_shapes_raise(combine: Callable[[Any, Any], State]) -> None:
    """Missing keys are never skipped, and shapes never broadcast (trap 33)."""
    a = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    for wrong, message in (
        ({"w": a["w"]}, "missing from .*: b"),
        ({**a, "extra": a["b"]}, "unexpected in .*: extra"),
        ({**a, "b": torch.zeros(1)}, r"of another shape in .*: b \[1\] for \[2\]"),
    ):
        with pytest.raises(ValueError, match=f"must have the same names and shapes; {message}"):
            combine(a, wrong)
    reordered = OrderedDict(reversed(a.items()))
    assert_close(combine(a, reordered), combine(a, a), rtol=0, atol=0)


@pytest.mark.parametrize("number", [2, 3, 7])
def test_what_is_equal_in_all_models_stays(number: int) -> None:
    """Neither a mask of the lowest number nor a frozen tensor changes in its last digit."""
    model = {"mask": torch.tensor([torch.finfo(torch.float32).min]), "frozen": torch.linspace(-1, 1, 101)}
    assert_close(average([model] * number), model, rtol=0, atol=0)
    assert_close(model_stock(model, [model] * number), model, rtol=0, atol=0)


def test_model_stock_takes_complex_weights() -> None:
    """As pairs of real ones."""
    real = [{"w": torch.tensor(values)} for values in ([0.0, 0.0], [2.0, 0.0], [2.0, 2.0])]
    start, *models = ({"w": torch.view_as_complex(state["w"])[None]} for state in real)
    assert_close(torch.view_as_real(model_stock(start, models)["w"])[0], model_stock(real[0], real[1:])["w"])


def test_a_variance_is_never_extrapolated_below_zero() -> None:
    """A negative one would make the model give NaN."""
    first, second = ({"bn.running_var": torch.tensor([1.0, value])} for value in (1.0, 0.2))
    assert_close(interpolate(first, second, 1.5, extrapolate=True)["bn.running_var"], torch.tensor([1.0, 0.0]))


@combinations
def test_kinds_of_numbers_must_agree(combine: Callable[[Any, Any], State]) -> None:
    """An integer cannot hold the mean of an integer and a fraction."""
    with pytest.raises(
        TypeError, match=r"\['w'\] must be of one kind in all models, got torch.int64 and torch.float32"
    ):
        combine({"w": torch.tensor([0])}, {"w": torch.tensor([4.0])})
