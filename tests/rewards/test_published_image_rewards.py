"""HPSv2 and ImageReward from weights in their published naming, against the equations in torch."""

import pytest
import torch
from builders import TEXT_LENGTH, tiny_stable_diffusion
from safetensors.torch import load_file, save_file
from tiny_clip import write_clip
from torch.nn import functional as F
from torch.nn.functional import layer_norm, linear
from torchvision import transforms
from torchvision.transforms.functional import pad as pad_picture
from torchvision.transforms.functional import to_pil_image
from transformers import BertTokenizer, CLIPModel, CLIPTokenizer

from diffdiv.models.backbones import LatentCodec
from diffdiv.rewards.clip import hpsv2_reward
from diffdiv.rewards.image_reward import ImageRewardNet, image_reward
from diffdiv.rewards.images import check_image_reward
from diffdiv.rewards.pixels import CLIP_MEAN, CLIP_STD, fitted, normalised
from diffdiv.rewards.published import clip_names
from diffdiv.rewards.zoo import weights_sha256

CPU = torch.device("cpu")
PROMPTS = ["a red seven", "two on white"]


def smooth_pictures(height=48, width=48):
    """Pictures that resizing does not alias: sums of few waves."""
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


def random_like(shapes, seed=0, scale=0.2):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) * scale for n, shape in shapes.items()}


# -- HPSv2: CLIP in open_clip's naming -------------------------------------------------------------


def block_shapes(prefix, width, inner):
    return {
        f"{prefix}.ln_1.weight": (width,), f"{prefix}.ln_1.bias": (width,),
        f"{prefix}.ln_2.weight": (width,), f"{prefix}.ln_2.bias": (width,),
        f"{prefix}.attn.in_proj_weight": (3 * width, width),
        f"{prefix}.attn.in_proj_bias": (3 * width,),
        f"{prefix}.attn.out_proj.weight": (width, width), f"{prefix}.attn.out_proj.bias": (width,),
        f"{prefix}.mlp.c_fc.weight": (inner, width), f"{prefix}.mlp.c_fc.bias": (inner,),
        f"{prefix}.mlp.c_proj.weight": (width, inner), f"{prefix}.mlp.c_proj.bias": (width,),
    }  # fmt: skip


def open_clip_weights():
    """Of the shape of tests/tiny_clip.py."""
    shapes = {
        "positional_embedding": (TEXT_LENGTH, 16), "text_projection": (16, 8), "logit_scale": (),
        "token_embedding.weight": (64, 16), "ln_final.weight": (16,), "ln_final.bias": (16,),
        "visual.class_embedding": (16,), "visual.positional_embedding": (5, 16),
        "visual.proj": (16, 8), "visual.conv1.weight": (16, 3, 8, 8),
        "visual.ln_pre.weight": (16,), "visual.ln_pre.bias": (16,),
        "visual.ln_post.weight": (16,), "visual.ln_post.bias": (16,),
        **block_shapes("transformer.resblocks.0", 16, 32),
        **block_shapes("visual.transformer.resblocks.0", 16, 32),
    }  # fmt: skip
    return random_like(shapes)


def norm(x, w, name, eps=1e-5):
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def residual_block(x, w, prefix, mask=None):
    """Pre-norm, by torch's own multi-head attention; CLIP's sigmoid approximation of GELU."""
    h = norm(x, w, f"{prefix}.ln_1").transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        h, h, h, x.shape[-1], 2, w[f"{prefix}.attn.in_proj_weight"],
        w[f"{prefix}.attn.in_proj_bias"], None, None, False, 0.0,
        w[f"{prefix}.attn.out_proj.weight"], w[f"{prefix}.attn.out_proj.bias"],
        training=False, attn_mask=mask, need_weights=False,
    )  # fmt: skip
    x = x + out.transpose(0, 1)
    h = linear(norm(x, w, f"{prefix}.ln_2"), *[w[f"{prefix}.mlp.c_fc.{k}"] for k in KINDS])
    return x + linear(h * (1.702 * h).sigmoid(), *[w[f"{prefix}.mlp.c_proj.{k}"] for k in KINDS])


KINDS = ("weight", "bias")


def open_clip_cosine(pixels, tokens, last, w):
    """CLIP's two towers from the equations; ``last`` is the place of the end of each text."""
    x = F.conv2d(pixels, w["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(x + w["visual.positional_embedding"], w, "visual.ln_pre")
    x = residual_block(x, w, "visual.transformer.resblocks.0")
    shown = norm(x[:, 0], w, "visual.ln_post") @ w["visual.proj"]
    y = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    causal = torch.full((TEXT_LENGTH, TEXT_LENGTH), -torch.inf).triu(1)
    y = norm(residual_block(y, w, "transformer.resblocks.0", causal), w, "ln_final")
    said = y[torch.arange(len(y)), last] @ w["text_projection"]
    return F.cosine_similarity(shown, said)


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory):
    folder = write_clip(tmp_path_factory.mktemp("hps"))
    save_file(open_clip_weights(), folder / "hpsv2_1.safetensors")
    return folder


def test_hpsv2_in_open_clip_naming_is_the_cosine_of_its_equations(hps_folder):
    images = smooth_pictures()
    weights = open_clip_weights()
    tokens = CLIPTokenizer.from_pretrained(hps_folder)(
        PROMPTS, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    )
    pixels = normalised(fitted(images, 16), CLIP_MEAN, CLIP_STD)
    wanted = open_clip_cosine(pixels, tokens.input_ids, tokens.attention_mask.sum(1) - 1, weights)
    reward = hpsv2_reward(hps_folder, CPU, name="hpsv2_1")
    assert reward.name == "hpsv2_1"
    torch.testing.assert_close(reward(images, PROMPTS), wanted, rtol=0, atol=1e-5)
    # without a file of its own, the folder's weights are meant
    plain = hpsv2_reward(hps_folder, CPU)(images, PROMPTS)
    assert float((plain - wanted).abs().max()) > 1e-3


def test_the_names_of_a_clip_are_complete(hps_folder):
    state = CLIPModel.from_pretrained(hps_folder).state_dict()
    mapped = clip_names(open_clip_weights())
    assert {n: v.shape for n, v in mapped.items()} == {n: v.shape for n, v in state.items()}
    assert clip_names(state).keys() == state.keys()  # transformers' own names stay


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj": None}, "visual_projection.weight is missing"),
        ({"visual.head": torch.zeros(1)}, "visual.head is unknown"),
        ({"ln_final.bias": torch.zeros(3)}, r"final_layer_norm.bias is \[3\], not \[16\]"),
    ],
)
def test_unfit_weights_are_named(tmp_path, change, message):
    folder = write_clip(tmp_path)
    weights = {n: v for n, v in (open_clip_weights() | change).items() if v is not None}
    save_file(weights, folder / "hpsv2.safetensors")
    with pytest.raises(ValueError, match=rf"hpsv2\.safetensors: .*1 faults: .*{message}"):
        hpsv2_reward(folder, CPU)


def test_hpsv2_pads_what_is_not_square():
    """Longer side to the size, black beside, as PIL does it on 8-bit pictures."""
    images = smooth_pictures(40, 64)
    found = fitted(images, 16, "pad")
    for image, ours in zip(images, found, strict=True):
        picture = to_pil_image(((image + 1) * 127.5).round().to(torch.uint8))
        small = picture.resize((16, 10), 3)  # bicubic
        wanted = transforms.ToTensor()(pad_picture(small, [0, 3, 0, 3], fill=0))
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0.01)


# -- ImageReward: BLIP -----------------------------------------------------------------------------


WIDTH, TEXT_WIDTH, WORDS = 128, 64, 40


def attention_shapes(prefix, width, other):
    shapes = {}
    for part, source in (("query", width), ("key", other), ("value", other)):
        shapes |= {f"{prefix}.self.{part}.weight": (width, source)}
        shapes |= {f"{prefix}.self.{part}.bias": (width,)}
    shapes |= {f"{prefix}.output.dense.weight": (width, width)}
    names = ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")
    return shapes | {f"{prefix}.output.{n}": (width,) for n in names}


def published_image_reward():
    """Tiny ViT of one block with two heads, a BERT of two layers with one head; 16 patches."""
    eye, bert = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{eye}.cls_token": (1, 1, WIDTH), f"{eye}.pos_embed": (1, 17, WIDTH),
        f"{eye}.patch_embed.proj.weight": (WIDTH, 3, 4, 4),
        f"{eye}.patch_embed.proj.bias": (WIDTH,),
        f"{eye}.norm.weight": (WIDTH,), f"{eye}.norm.bias": (WIDTH,),
        f"{eye}.blocks.0.attn.qkv.weight": (3 * WIDTH, WIDTH),
        f"{eye}.blocks.0.attn.qkv.bias": (3 * WIDTH,),
        f"{eye}.blocks.0.attn.proj.weight": (WIDTH, WIDTH),
        f"{eye}.blocks.0.mlp.fc1.weight": (32, WIDTH), f"{eye}.blocks.0.mlp.fc1.bias": (32,),
        f"{eye}.blocks.0.mlp.fc2.weight": (WIDTH, 32),
        f"{bert}.embeddings.word_embeddings.weight": (WORDS, TEXT_WIDTH),
        f"{bert}.embeddings.position_embeddings.weight": (35, TEXT_WIDTH),
        "blip.vision_proj.weight": (8, WIDTH), "blip.text_proj.weight": (8, TEXT_WIDTH),
    }  # fmt: skip
    for name in ("attn.proj.bias", "mlp.fc2.bias", "norm1.weight", "norm1.bias", "norm2.weight"):
        shapes[f"{eye}.blocks.0.{name}"] = (WIDTH,)
    shapes[f"{eye}.blocks.0.norm2.bias"] = (WIDTH,)
    for kind in KINDS:
        shapes[f"{bert}.embeddings.LayerNorm.{kind}"] = (TEXT_WIDTH,)
    for n in range(2):
        layer = f"{bert}.encoder.layer.{n}"
        shapes |= attention_shapes(f"{layer}.attention", TEXT_WIDTH, TEXT_WIDTH)
        shapes |= attention_shapes(f"{layer}.crossattention", TEXT_WIDTH, WIDTH)
        shapes |= {f"{layer}.intermediate.dense.weight": (48, TEXT_WIDTH)}
        shapes |= {f"{layer}.intermediate.dense.bias": (48,)}
        shapes |= {f"{layer}.output.dense.weight": (TEXT_WIDTH, 48)}
        names = ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")
        shapes |= {f"{layer}.output.{name}": (TEXT_WIDTH,) for name in names}
    for number, inner, outer in ((0, TEXT_WIDTH, 20), (2, 20, 6), (10, 6, 1)):
        shapes[f"mlp.layers.{number}.weight"] = (outer, inner)
        shapes[f"mlp.layers.{number}.bias"] = (outer,)
    weights = random_like(shapes, seed=3, scale=0.4)
    weights[f"{bert}.embeddings.position_ids"] = torch.arange(35)[None]  # older files hold it
    return weights


def dense(x, w, name):
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def attend(q, k, v, heads, keep=None):
    """softmax(q k' / sqrt(d)) v by heads, in einsum."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if keep is not None:
        logits = logits.masked_fill(~keep[:, None, None].bool(), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)


def see(pixels, w):
    """timm's vision transformer."""
    e = "blip.visual_encoder"
    conv = [w[f"{e}.patch_embed.proj.{kind}"] for kind in KINDS]
    x = F.conv2d(pixels, *conv, stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{e}.cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{e}.pos_embed"]
    b = f"{e}.blocks.0"
    qkv = dense(norm(x, w, f"{b}.norm1", 1e-6), w, f"{b}.attn.qkv").chunk(3, -1)
    x = x + dense(attend(*qkv, heads=2), w, f"{b}.attn.proj")
    h = F.gelu(dense(norm(x, w, f"{b}.norm2", 1e-6), w, f"{b}.mlp.fc1"))
    return norm(x + dense(h, w, f"{b}.mlp.fc2"), w, f"{e}.norm", 1e-6)


def read(seen, tokens, keep, w):
    """BERT, both ways, with cross-attention to what is seen in every layer."""
    e = "blip.text_encoder"
    x = w[f"{e}.embeddings.word_embeddings.weight"][tokens]
    x = x + w[f"{e}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(x, w, f"{e}.embeddings.LayerNorm", 1e-12)
    for n in range(2):
        for part, source, mask in (("attention", None, keep), ("crossattention", seen, None)):
            p = f"{e}.encoder.layer.{n}.{part}"
            given = x if source is None else source
            q, k, v = (
                dense(x, w, f"{p}.self.query"),
                *(dense(given, w, f"{p}.self.{name}") for name in ("key", "value")),
            )
            out = dense(attend(q, k, v, 1, mask), w, f"{p}.output.dense")
            x = norm(x + out, w, f"{p}.output.LayerNorm", 1e-12)
        p = f"{e}.encoder.layer.{n}"
        out = dense(F.gelu(dense(x, w, f"{p}.intermediate.dense")), w, f"{p}.output.dense")
        x = norm(x + out, w, f"{p}.output.LayerNorm", 1e-12)
    return x[:, 0]


def image_reward_by_equations(pixels, tokens, keep, w):
    x = read(see(pixels, w), tokens, keep, w)
    for number in (0, 2, 10):
        x = dense(x, w, f"mlp.layers.{number}")
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    save_file(published_image_reward(), folder / "image_reward.safetensors")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "red",
        "seven",
        "two",
        "on",
        "white",
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def test_image_reward_equals_its_equations_by_the_plain_route(blip_folder):
    """8-bit pictures resized by PIL, tokens of BERT, every equation written out."""
    images, w = smooth_pictures(40, 64), published_image_reward()
    prepare = transforms.Compose(
        [
            transforms.Resize(16, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    pictures = [to_pil_image(((x + 1) * 127.5).round().to(torch.uint8)) for x in images]
    pixels = torch.stack([prepare(picture) for picture in pictures])
    tokens = BertTokenizer.from_pretrained(blip_folder)(
        PROMPTS, padding="max_length", max_length=35, return_tensors="pt"
    )
    keep = tokens.attention_mask
    assert keep.sum(1).tolist() == [5, 5] and tokens.input_ids[0, 1:4].tolist() == [5, 6, 7]
    net = ImageRewardNet(w, blip_folder).eval()
    exact = image_reward_by_equations(pixels, tokens.input_ids, keep, w)
    assert float((exact[0] - exact[1]).abs()) > 0.1  # it tells them apart
    torch.testing.assert_close(
        net(pixels, tokens.input_ids, keep).detach(), exact, rtol=1e-4, atol=1e-4
    )
    found = image_reward(blip_folder, CPU)(images, PROMPTS)
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0.01 * float(exact.abs().max()))


def test_gradient_of_image_reward_reaches_the_latent(blip_folder, tmp_path):
    """Through the VAE; against a central difference along the gradient."""
    reward = image_reward(blip_folder, CPU)
    check_image_reward(reward, 16, PROMPTS[0], CPU)
    codec = LatentCodec(tiny_stable_diffusion(tmp_path), CPU)
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def value(x):
        return reward(codec.decode_with_gradient(x), PROMPTS).double().sum()

    leaf = latent.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    direction, h = gradient / gradient.norm(), 0.03
    with torch.no_grad():
        slope = (value(latent + h * direction) - value(latent - h * direction)) / (2 * h)
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_missing_or_unfit_weights_of_image_reward_are_named(blip_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image_reward\.safetensors"):
        image_reward(tmp_path, CPU)
    weights = load_file(blip_folder / "image_reward.safetensors")
    save_file(weights, tmp_path / "image_reward.safetensors")
    with pytest.raises(FileNotFoundError, match="tokenizer of bert-base-uncased"):
        image_reward(tmp_path, CPU)
    for name, message in (
        ("blip.visual_encoder.norm.bias", "post_layernorm.bias is missing"),
        ("blip.visual_encoder.pos_embed", "embeddings.position_embedding' is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageRewardNet({n: v for n, v in weights.items() if n != name}, tmp_path)


def test_hashes_of_weights(blip_folder):
    class Settings:
        path = blip_folder

    found = weights_sha256({"image_reward": Settings(), "off": None})
    assert list(found) == ["image_reward/image_reward.safetensors"]
    assert all(len(value) == 64 for value in found.values())
