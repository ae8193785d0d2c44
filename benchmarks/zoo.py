"""Real architectures, small: built from configurations with random weights, each with a batch for it.

A builder is entered as cases.py says. Nothing is downloaded.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torchvision_on_cpu  # noqa: F401 - before all that imports torchvision

# isort: split
import peft
import timm
import torchvision.models as tv
import transformers as hf
from cases import ARCHITECTURES, BATCH, CLASSES, TOKENS, VOCABULARY, Case, by_logits, entry, images, tokens
from timm.layers import GroupNormAct, StdConv2d
from timm.models import convmixer, metaformer, mlp_mixer, resnetv2
from torch import nn

hf.logging.set_verbosity_error()


def versions() -> str:
    """The libraries and their versions, in a line."""
    return ", ".join(f"{name} {version(name)}" for name in ("torchvision", "timm", "transformers", "peft"))


# ---- Batches and losses ----------------------------------------------------------------------------------------------


def fix_batch_norm(model: nn.Module) -> None:
    """Normalise by the running statistics, which couple no samples."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


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
