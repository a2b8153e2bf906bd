"""Token denoisers: the paper's network written again from its description, and stock models."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import BertConfig, BertForMaskedLM, EsmConfig, EsmForMaskedLM

from diffdiv.models.token_networks import DilatedTokenNet, TransformerTokenNet, _rotate
from diffdiv.models.tokens import masked_language_denoiser, token_denoiser

V, LENGTH = 4, 11


def tokens(batch: int = 3, num_tokens: int = V, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_tokens + 1, (batch, LENGTH), generator=generator)


def dilated() -> DilatedTokenNet:
    torch.manual_seed(0)
    net = DilatedTokenNet(V, width=6, kernel=9, dilations=(1, 4, 16)).eval()
    for block in net.blocks:  # as trained: not the zeros of the start
        nn.init.normal_(block.shift)
        nn.init.normal_(block.norm.weight)
        nn.init.normal_(block.norm.bias)
    return net


def transformer() -> TransformerTokenNet:
    torch.manual_seed(0)
    return TransformerTokenNet(V, width=16, depth=2, heads=2).eval()


NETS = pytest.mark.parametrize("make", [dilated, transformer])


def released_network(net: DilatedTokenNet, x: Tensor) -> Tensor:
    """The released layout: channels first, one-dimensional convolutions, a linear map of a time
    embedding added in every block, normalisation through transposes."""
    features = torch.relu(
        nn.functional.conv1d(
            one_hot(x, V + 1).float().permute(0, 2, 1),
            net.stem.weight[:, :, 0],
            net.stem.bias,
            padding=4,
        )
    )
    embedding = torch.randn(len(x), 5)  # constant over the run; any will do
    embedding[:] = embedding[0]
    for block in net.blocks:
        time = nn.Linear(5, features.shape[1])
        time.bias.data = block.shift.data - time.weight.data @ embedding[0]
        h = features + time(embedding)[:, :, None]
        norm = nn.functional.layer_norm(
            h.permute(0, 2, 1), h.shape[1:2], block.norm.weight, block.norm.bias
        )
        dilation = block.conv.dilation[1]
        h = nn.functional.conv1d(
            norm.permute(0, 2, 1),
            block.conv.weight[:, :, 0],
            block.conv.bias,
            padding=4 * dilation,
            dilation=dilation,
        )
        features = features + torch.relu(h)
    h = torch.relu(nn.functional.conv1d(features, net.mix.weight[..., None], net.mix.bias))
    return nn.functional.conv1d(h, net.head.weight[..., None], net.head.bias).permute(0, 2, 1)


@torch.no_grad()
def test_dilated_network_is_the_papers():
    net, x = dilated(), tokens()
    torch.testing.assert_close(net(x).logits, released_network(net, x), rtol=1e-4, atol=1e-5)


def test_default_size_is_the_papers():
    """The paper's network has 3,326,597 parameters. Not here: the layer of its time embedding, a
    128 x 128 matrix in each of 20 blocks, an output for the mask (129)."""
    net = DilatedTokenNet()
    assert [b.conv.dilation[1] for b in net.blocks] == [1] * 8 + [4] * 4 + [16] * 4 + [64] * 4
    ours = sum(p.numel() for p in net.parameters())
    assert 3_326_597 - ours == (128 * 128 + 128) + 20 * 128 * 128 + 129


@NETS
def test_tokens_and_their_one_hot_rows_give_the_same(make):
    denoiser, x = token_denoiser(make()), tokens()
    with torch.no_grad():
        hard = denoiser.log_probs(x)
        soft = denoiser.log_probs(one_hot(x, V + 1).float())
    assert hard.shape == (3, LENGTH, V) and hard.dtype == torch.float32
    torch.testing.assert_close(hard, soft, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hard.exp().sum(-1), torch.ones(3, LENGTH))
    kept = x != V
    assert torch.equal(hard.argmax(-1)[kept], x[kept])


@NETS
def test_gradient_in_a_soft_state_by_differences(make):
    net = make().double()
    x = torch.softmax(
        torch.randn(1, 5, V + 1, generator=torch.Generator().manual_seed(0)).double(), -1
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x).logits, (x,))


@NETS
@torch.no_grad()
def test_sequences_of_a_batch_do_not_see_each_other(make):
    net, x = make(), tokens()
    torch.testing.assert_close(net(x).logits[1:2], net(x[1:2]).logits, rtol=1e-5, atol=1e-5)
    assert net(x[:, :7]).logits.shape == (3, 7, V)


@NETS
@torch.no_grad()
def test_folder_round_trip(make, tmp_path):
    net, x = make(), tokens()
    net.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    again = type(net).from_pretrained(tmp_path)
    assert torch.equal(again(x).logits, net(x).logits)
    assert json.loads((tmp_path / "config.json").read_text())["num_tokens"] == V


@torch.no_grad()
def test_transformer_sees_order_and_only_distances():
    """A flipped input gives more than a flipped output; rotated products depend on distance."""
    net = transformer()
    x = tokens(1)
    permuted = net(x.flip(1)).logits.flip(1)
    assert float((permuted - net(x).logits).abs().max()) > 1e-3
    q, k = torch.randn(2, 1, 8)
    speeds = 10_000 ** -(torch.arange(4) / 4)

    def product(i: float, j: float) -> float:
        return float((_rotate(q, i * speeds) * _rotate(k, j * speeds)).sum())

    assert product(3.0, 7.0) == pytest.approx(product(13.0, 17.0), abs=1e-4)
    assert abs(product(3.0, 7.0) - product(3.0, 4.0)) > 1e-3


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="kernel"):
        DilatedTokenNet(kernel=8)
    with pytest.raises(ValueError, match="heads"):
        TransformerTokenNet(width=18, heads=4)


# -- masked language models of transformers ----------------------------------------------------


def bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
        )
    ).eval()


def esm() -> EsmForMaskedLM:
    torch.manual_seed(0)
    return EsmForMaskedLM(
        EsmConfig(
            vocab_size=9,
            mask_token_id=2,
            pad_token_id=0,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
            position_embedding_type="rotary",
        )
    ).eval()


@torch.no_grad()
def test_language_model_on_a_choice_of_its_tokens():
    net = bert()
    denoiser = masked_language_denoiser(net, mask_id=2, token_ids=[7, 3, 5])
    assert denoiser.num_tokens == denoiser.mask_id == 3
    x = tokens(num_tokens=3)
    ids = torch.tensor([7, 3, 5, 2])[x]
    expected = torch.log_softmax(net(input_ids=ids).logits[..., [7, 3, 5]], -1)
    ours = denoiser.log_probs(x)
    torch.testing.assert_close(ours[x == 3], expected[x == 3])
    soft = denoiser.log_probs(one_hot(x, 4).float())
    torch.testing.assert_close(ours, soft, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [bert, esm])
@torch.no_grad()
def test_whole_vocabulary_but_the_mask(make):
    net = make()
    denoiser = masked_language_denoiser(net, mask_id=2)
    assert denoiser.num_tokens == 8
    x = denoiser.all_masked(2, 6)
    assert x.tolist() == [[8] * 6] * 2
    expected = net(input_ids=torch.full((2, 6), 2)).logits
    expected[..., 2] = -torch.inf
    expected = torch.log_softmax(expected, -1)[..., [0, 1, 3, 4, 5, 6, 7, 8]]
    torch.testing.assert_close(denoiser.log_probs(x), expected)


def test_reward_gradients_reach_a_language_models_weights():
    net = bert()
    denoiser = masked_language_denoiser(net, mask_id=2)
    x = torch.softmax(torch.randn(2, 6, 9), -1).requires_grad_()
    denoiser.log_probs(x)[..., 0].sum().backward()
    assert x.grad is not None and net.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize("ids", [[7, 7], [9], [-1], [2, 3]])
def test_ids_that_cannot_be_are_refused(ids):
    with pytest.raises(ValueError, match="token_ids"):
        masked_language_denoiser(bert(), mask_id=2, token_ids=ids)
