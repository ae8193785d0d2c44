"""Real architectures, small: built from configurations with random weights, each with a batch for it.

A builder is entered in `ARCHITECTURES` under "library: name". It takes the dropout rate and returns a `Case`. Nothing
is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision_on_cpu  # noqa: F401 - before all that imports torchvision

# isort: split
import peft
import timm
import torchvision.models as tv
import transformers as hf
from timm.layers import GroupNormAct, StdConv2d
from timm.models import convmixer, metaformer, mlp_mixer, resnetv2
from torch import Tensor, nn

hf.logging.set_verbosity_error()

CLASSES, VOCABULARY, TOKENS, BATCH = 10, 50, 8, 16


class Case(NamedTuple):
    """A model and a batch, the samples first: one tensor, a tuple of inputs, or a dict of keyword inputs."""

    model: nn.Module
    x: Any
    y: Tensor
    loss_fn: Callable[[Any, Tensor], Tensor] = F.cross_entropy
    way_out: Callable[[nn.Module], object] | None = (
        None  # of a refusal that is expected: done to the model, it is served
    )


ARCHITECTURES: dict[str, Callable[[float], Case]] = {}


def versions() -> str:
    """The libraries and their versions, in a line."""
    return ", ".join(f"{name} {version(name)}" for name in ("torchvision", "timm", "transformers", "peft"))


def entry(name: str) -> Callable:
    def enter(builder: Callable) -> Callable:
        ARCHITECTURES[name] = builder
        return builder

    return enter


# ---- Batches and losses ----------------------------------------------------------------------------------------------


def images(model: nn.Module, size: int = 32, **more: Any) -> Case:
    return Case(model, torch.randn(BATCH, 3, size, size), torch.randint(CLASSES, (BATCH,)), **more)


def fix_batch_norm(model: nn.Module) -> None:
    """Normalise by the running statistics, which couple no samples."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, TOKENS))


def by_logits(output: Any, y: Tensor) -> Tensor:
    """The mean over samples, for a class or for a class at each position."""
    return F.cross_entropy(output.logits.flatten(0, -2), y.flatten())


def next_tokens(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def text(model: nn.Module) -> Case:
    """A language model of transformers: a class at each position."""
    return Case(model, {"input_ids": tokens()}, tokens(), by_logits)


def classified(model: nn.Module) -> Case:
    """A classifier of transformers on texts of different lengths, padded."""
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (BATCH, 1))).long()
    x = {"input_ids": tokens(), "attention_mask": mask}
    return Case(model, x, torch.randint(CLASSES, (BATCH,)), by_logits)


# ---- torchvision -----------------------------------------------------------------------------------------------------

group_norm = partial(nn.GroupNorm, 4)


@entry("torchvision: resnet, GroupNorm")
def _(dropout: float) -> Case:
    return images(tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], CLASSES, norm_layer=group_norm))


@entry("torchvision: resnet, BatchNorm")
def _(dropout: float) -> Case:
    return images(tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], CLASSES), way_out=fix_batch_norm)


@entry("torchvision: vgg")
def _(dropout: float) -> Case:
    model = tv.VGG(tv.vgg.make_layers([16, "M", 32, "M", 512, "M"]), CLASSES, init_weights=False, dropout=dropout)
    model.classifier[0], model.classifier[3] = nn.Linear(512 * 49, 32), nn.Linear(32, 32)
    model.classifier[6] = nn.Linear(32, CLASSES)
    return images(model)


@entry("torchvision: mobilenet_v3")
def _(dropout: float) -> Case:
    return images(tv.mobilenet_v3_small(num_classes=CLASSES, width_mult=0.5, norm_layer=group_norm, dropout=dropout))


@entry("torchvision: efficientnet")
def _(dropout: float) -> Case:
    stages = [
        tv.efficientnet.MBConvConfig(
            expand_ratio=2, kernel=3, stride=stride, input_channels=16, out_channels=16, num_layers=1
        )
        for stride in (1, 2)
    ]
    model = tv.EfficientNet(stages, dropout, stochastic_depth_prob=dropout, num_classes=CLASSES, norm_layer=group_norm)
    return images(model)


@entry("torchvision: convnext")
def _(dropout: float) -> Case:
    stages = [tv.convnext.CNBlockConfig(32, 64, 1), tv.convnext.CNBlockConfig(64, None, 1)]
    return images(tv.ConvNeXt(stages, stochastic_depth_prob=dropout, num_classes=CLASSES))


@entry("torchvision: densenet")
def _(dropout: float) -> Case:
    model = tv.DenseNet(8, (2, 2), 16, bn_size=2, drop_rate=dropout, num_classes=CLASSES)
    return images(model, way_out=fix_batch_norm)


@entry("torchvision: regnet")
def _(dropout: float) -> Case:
    stages = tv.regnet.BlockParams([1, 1], [32, 64], [16, 16], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return images(tv.RegNet(stages, CLASSES, norm_layer=group_norm))


@entry("torchvision: vit")
def _(dropout: float) -> Case:
    return images(tv.VisionTransformer(32, 8, 2, 4, 32, 64, dropout, dropout, CLASSES))


@entry("torchvision: swin")
def _(dropout: float) -> Case:
    model = tv.SwinTransformer(
        [4, 4], 32, [2, 2], [2, 4], [4, 4], 2.0, dropout, dropout, stochastic_depth_prob=dropout, num_classes=CLASSES
    )
    return images(model)


@entry("torchvision: squeezenet")
def _(dropout: float) -> Case:
    return images(tv.SqueezeNet("1_1", CLASSES, dropout))


@entry("torchvision: shufflenet")
def _(dropout: float) -> Case:
    return images(tv.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], CLASSES), way_out=fix_batch_norm)


# ---- timm ------------------------------------------------------------------------------------------------------------


def vision(name: str, **changes: Any) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **changes)


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


@entry("timm: vit")
def _(dropout: float) -> Case:
    rates = {"drop_rate": dropout, "attn_drop_rate": dropout, "drop_path_rate": dropout}
    return images(vision("vit_tiny_patch16_224", **SMALL_VIT, **rates))


@entry("timm: deit, distilled")
def _(dropout: float) -> Case:
    return images(vision("deit_tiny_distilled_patch16_224", **SMALL_VIT, drop_rate=dropout))


@entry("timm: beit")
def _(dropout: float) -> Case:
    model = vision("beit_base_patch16_224", **SMALL_VIT, init_values=0.1, use_rel_pos_bias=True, drop_path_rate=dropout)
    return images(model)


@entry("timm: mixer")
def _(dropout: float) -> Case:
    return images(mlp_mixer.MlpMixer(CLASSES, 32, patch_size=8, num_blocks=2, embed_dim=32, proj_drop_rate=dropout))


@entry("timm: resmlp")
def _(dropout: float) -> Case:
    plan = {"mlp_ratio": 4, "block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine}
    return images(mlp_mixer.MlpMixer(CLASSES, 32, patch_size=8, num_blocks=2, embed_dim=32, **plan))


@entry("timm: convmixer")
def _(dropout: float) -> Case:
    return images(convmixer.ConvMixer(32, 2, kernel_size=5, patch_size=4, num_classes=CLASSES), way_out=fix_batch_norm)


@entry("timm: convnext")
def _(dropout: float) -> Case:
    return images(vision("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 32), drop_path_rate=dropout))


@entry("timm: levit")
def _(dropout: float) -> Case:
    sizes = {"embed_dim": (32, 48), "num_heads": (2, 3), "depth": (1, 1), "key_dim": 8, "img_size": 64}
    return images(vision("levit_128s", **sizes), 64, way_out=fix_batch_norm)


@entry("timm: poolformer")
def _(dropout: float) -> Case:
    model = metaformer.MetaFormer(
        num_classes=CLASSES,
        depths=(1, 1),
        dims=(16, 32),
        token_mixers=metaformer.Pooling,
        use_mlp_head=False,
        norm_layers=metaformer.GroupNorm1,
        layer_scale_init_values=1e-1,
        res_scale_init_values=None,
        drop_path_rate=dropout,
    )
    return images(model)


@entry("timm: resnetv2, standardised weights")
def _(dropout: float) -> Case:
    model = resnetv2.ResNetV2(
        (1, 1),
        (32, 64),
        CLASSES,
        stem_chs=16,
        conv_layer=StdConv2d,
        drop_path_rate=dropout,
        norm_layer=partial(GroupNormAct, num_groups=4),
    )
    return images(model)


# ---- transformers ----------------------------------------------------------------------------------------------------

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LENGTHS = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "num_labels": CLASSES, "pad_token_id": 0}


def bert_rates(dropout: float) -> dict[str, float]:
    return {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}


def small_gpt2(dropout: float) -> nn.Module:
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        **rates,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return hf.GPT2LMHeadModel(config)


@entry("transformers: gpt2, tied embeddings")
def _(dropout: float) -> Case:
    return text(small_gpt2(dropout))


@entry("transformers: llama")
def _(dropout: float) -> Case:
    config = hf.LlamaConfig(**WIDTHS, **LENGTHS, num_key_value_heads=2, attention_dropout=dropout, use_cache=False)
    return text(hf.LlamaForCausalLM(config))


@entry("transformers: mistral")
def _(dropout: float) -> Case:
    config = hf.MistralConfig(
        **WIDTHS, **LENGTHS, num_key_value_heads=2, sliding_window=4, attention_dropout=dropout, use_cache=False
    )
    return text(hf.MistralForCausalLM(config))


@entry("transformers: mixtral")
def _(dropout: float) -> Case:
    config = hf.MixtralConfig(
        **WIDTHS, **LENGTHS, num_key_value_heads=2, num_local_experts=4, attention_dropout=dropout, use_cache=False
    )
    return text(hf.AutoModelForCausalLM.from_config(config, experts_implementation="eager"))


@entry("transformers: opt")
def _(dropout: float) -> Case:
    config = hf.OPTConfig(
        **LENGTHS,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=dropout,
        attention_dropout=dropout,
        use_cache=False,
    )
    return text(hf.OPTForCausalLM(config))


@entry("transformers: bert")
def _(dropout: float) -> Case:
    return classified(hf.BertForSequenceClassification(hf.BertConfig(**WIDTHS, **LENGTHS, **bert_rates(dropout))))


@entry("transformers: roberta")
def _(dropout: float) -> Case:
    config = hf.RobertaConfig(**WIDTHS, **LENGTHS, **bert_rates(dropout))
    return classified(hf.RobertaForSequenceClassification(config))


@entry("transformers: albert, one layer used twice")
def _(dropout: float) -> Case:
    config = hf.AlbertConfig(
        **WIDTHS, **LENGTHS, embedding_size=16, classifier_dropout_prob=dropout, **bert_rates(dropout)
    )
    return classified(hf.AlbertForSequenceClassification(config))


@entry("transformers: distilbert")
def _(dropout: float) -> Case:
    config = hf.DistilBertConfig(
        **LENGTHS,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        dropout=dropout,
        attention_dropout=dropout,
        seq_classif_dropout=dropout,
    )
    return classified(hf.DistilBertForSequenceClassification(config))


@entry("transformers: t5")
def _(dropout: float) -> Case:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        use_cache=False,
    )
    x = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    return Case(hf.T5ForConditionalGeneration(config), x, tokens(), by_logits)


@entry("transformers: vit")
def _(dropout: float) -> Case:
    config = hf.ViTConfig(**WIDTHS, image_size=32, patch_size=8, num_labels=CLASSES, **bert_rates(dropout))
    return images(hf.ViTForImageClassification(config), loss_fn=by_logits)


@entry("transformers: wav2vec2")
def _(dropout: float) -> Case:
    sizes = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4}
    rates = {"hidden_dropout": dropout, "attention_dropout": dropout, "activation_dropout": dropout}
    rates |= {"feat_proj_dropout": dropout, "layerdrop": 0.0, "mask_time_prob": 0.0, "final_dropout": dropout}
    config = hf.Wav2Vec2Config(
        **WIDTHS, **sizes, **rates, num_conv_pos_embedding_groups=2, num_labels=CLASSES, classifier_proj_size=16
    )
    model = hf.Wav2Vec2ForSequenceClassification(config)
    return Case(model, torch.randn(BATCH, 256), torch.randint(CLASSES, (BATCH,)), by_logits)


@entry("transformers: mamba")
def _(dropout: float) -> Case:
    config = hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, use_cache=False)
    return text(hf.MambaForCausalLM(config))


# ---- peft ------------------------------------------------------------------------------------------------------------


@entry("peft: LoRA on gpt2")
def _(dropout: float) -> Case:
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], lora_dropout=dropout, fan_in_fan_out=True)
    model = peft.get_peft_model(small_gpt2(dropout), config)
    return text(model)


@entry("peft: LoRA on llama")
def _(dropout: float) -> Case:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=dropout)
    model = ARCHITECTURES["transformers: llama"](dropout).model
    return text(peft.get_peft_model(model, config))


# ---- torch alone -----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Embedded tokens, a body that keeps their number, their mean, a class."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(VOCABULARY, 32), body, nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.embedding(x))
        return self.head((h[0] if isinstance(h, tuple) else h).mean(1))


def sequence(body: nn.Module) -> Case:
    return Case(Classifier(body), tokens(), torch.randint(CLASSES, (BATCH,)))


@entry("torch: TransformerEncoder")
def _(dropout: float) -> Case:
    return sequence(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True), 2))


@entry("torch: MultiheadAttention")
def _(dropout: float) -> Case:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(32, 4, dropout, batch_first=True), nn.LayerNorm(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.attention(x, x, x)[0])

    return sequence(Attention())


@entry("torch: LSTM")
def _(dropout: float) -> Case:
    return sequence(nn.LSTM(32, 32, 2, batch_first=True, dropout=dropout))


@entry("torch: GRU")
def _(dropout: float) -> Case:
    return sequence(nn.GRU(32, 32, 2, batch_first=True, dropout=dropout))


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])
        self.qkv, self.projection, self.dropout = nn.Linear(32, 96), nn.Linear(32, 32), dropout
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.projection(h.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """nanoGPT's plan: positions by arange, the head tied to the embedding."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 32), nn.Embedding(16, 32)
        self.dropout, self.blocks = nn.Dropout(dropout), nn.Sequential(Block(dropout), Block(dropout))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.dropout(self.tokens(x) + self.positions(positions)))))


@entry("torch: nanoGPT")
def _(dropout: float) -> Case:
    return Case(GPT(dropout), tokens(), tokens(), next_tokens)


class UNet(nn.Module):
    """Down and up again, with skip connections: a class at each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.twice(3, 16), self.twice(16, 32)])
        self.bottom = self.twice(32, 64)
        self.up = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)])
        self.merge = nn.ModuleList([self.twice(64, 32), self.twice(32, 16)])
        self.head = nn.Conv2d(16, CLASSES, 1)

    @staticmethod
    def twice(into: int, out: int) -> nn.Module:
        layers = [(nn.Conv2d(c, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU(inplace=True)) for c in (into, out)]
        return nn.Sequential(*layers[0], *layers[1])

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            skips.append(down(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        return self.head(x)


@entry("torch: U-Net")
def _(dropout: float) -> Case:
    return Case(UNet(), torch.randn(BATCH, 3, 16, 16), torch.randint(CLASSES, (BATCH, 16, 16)))


class GraphNet(nn.Module):
    """Graph convolutions on a batch of graphs with dense adjacencies."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 32), nn.Linear(32, 32)])
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(32, CLASSES)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = self.dropout(F.relu(adjacency @ layer(nodes)))
        return self.head(nodes.mean(1))


@entry("torch: graph convolutions")
def _(dropout: float) -> Case:
    x = torch.randn(BATCH, 6, 12), torch.rand(BATCH, 6, 6).softmax(-1)
    return Case(GraphNet(dropout), x, torch.randint(CLASSES, (BATCH,)))
