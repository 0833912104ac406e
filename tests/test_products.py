import pytest
import torch
from torch import nn

from rlhf_fast import products

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


@pytest.fixture
def layers(monkeypatch):
    """Every product counts as large enough; returns how many of them oneDNN was asked for."""
    monkeypatch.setattr(products, "LEAST", 0)
    asked = []
    inner = products._Product.apply
    monkeypatch.setattr(products._Product, "apply", lambda *given: asked.append(given) or inner(*given))
    return asked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(33, 7), (2, 5, 7), (1, 3, 0, 7)])
def test_a_linear_layer_and_its_gradients_are_those_of_float64(layers, bias, shape):
    x, weight, slope = draw(*shape), draw(5, 7), draw(*shape[:-1], 5)
    given = [x, weight, *([draw(5)] if bias else [])]
    single = [t.float().requires_grad_() for t in given]
    double = [t.clone().requires_grad_() for t in given]
    with products._Layers():
        found = nn.functional.linear(*single)
        found.backward(slope.float())
    expected = nn.functional.linear(*double)
    expected.backward(slope)
    assert len(layers) == 1
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(single, double, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


def test_the_layer_of_gpt2_is_one_too(layers):
    from transformers.pytorch_utils import Conv1D

    layer, x = Conv1D(6, 4), draw(2, 3, 4).float()
    with products._Layers():
        found = layer(x)
    expected = x.double() @ layer.weight.double() + layer.bias.double()
    assert len(layers) == 1
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient_and_a_second_derivative_is_right(layers):
    x, weight = draw(3, 4).float().requires_grad_(), draw(4, 4).float()
    with products._Layers():
        loss = nn.functional.linear(x, weight).pow(3).sum()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((wide @ weight.double().t()).pow(3).sum(), wide, create_graph=True)
    (expected,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-4)


def test_other_dtypes_autocast_and_small_products_are_left_alone(layers, monkeypatch):
    layer, x = nn.Linear(4, 4), draw(3, 4)
    with products._Layers():
        layer.double()(x)
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x.float()).dtype == torch.bfloat16
        monkeypatch.setattr(products, "LEAST", 3 * 4 * 4 + 1)
        layer(x.float())
    assert not layers


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch 2.9 has the setting")
def test_the_setting_of_pytorch_is_put_back(layers):
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="shape"), products._Layers():
        nn.functional.linear(torch.ones(2, 3), torch.ones(2, 4))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(("vendor", "capability", "rounds", "better"), [
    ("AuthenticAMD", "AVX512", False, True), ("GenuineIntel", "AVX512", False, False),
    ("AuthenticAMD", "AVX2", False, False), ("AuthenticAMD", "AVX512", True, False),
])  # fmt: skip
def test_onednn_is_asked_where_it_is_exact_and_the_faster_one(
    monkeypatch, tmp_path, vendor, capability, rounds, better
):
    if not hasattr(torch.backends.mkldnn, "matmul") or not torch.backends.mkl.is_available():
        pytest.skip("there is nothing to choose")
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_rounds", lambda: rounds)
    products.onednn_is_better.cache_clear()
    try:
        assert products.onednn_is_better() == better
    finally:
        products.onednn_is_better.cache_clear()


def test_bfloat16_would_be_noticed(monkeypatch):
    exact = torch.Tensor.__matmul__
    assert products._rounds() == torch.cpu._is_amx_tile_supported()
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: exact(a.bfloat16().float(), b.bfloat16().float()))
    assert products._rounds()


@pytest.mark.parametrize(
    ("flags", "device", "native"),
    [("avx2 avx512_bf16", "cpu", True), ("amx_bf16", "cpu", True), ("avx512f", "cpu", False), ("", "cuda", True)],
)
def test_where_bfloat16_is_native(monkeypatch, flags, device, native):
    monkeypatch.setattr(products, "_cpuinfo", lambda: f"flags : {flags}\n")
    assert products.bfloat16_is_native(torch.device(device)) == native


def test_no_input_feature_and_vmap(layers):
    with products._Layers():
        assert nn.functional.linear(torch.zeros(4, 0), torch.zeros(3, 0)).shape == (4, 3)
        layer, x = nn.Linear(7, 5), draw(3, 4, 7).float()
        found = torch.vmap(layer)(x)
    torch.testing.assert_close(found, x @ layer.weight.t() + layer.bias)
    assert not layers
