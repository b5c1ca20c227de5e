"""Networks for super-resolution, brain signals, sound, compression, reading, tables and control, small ones of each."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

Takes = tuple[int, ...] | Callable[[], tuple[torch.Tensor, ...]]
Network = tuple[Callable[[], nn.Module], Takes]

_IMAGE, _PHOTO, _SCALP, _SOUND = (1, 3, 32, 32), (1, 3, 64, 64), (2, 8, 800), (1, 1, 640)


def networks() -> dict[str, Network]:
    """How to build each network, and what it takes."""
    return {**_enlarging(), **_brain_signals(), **_sound(), **_images(), **_sequences(), **_tables()}


def _of(path: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        module, _, name = path.rpartition(".")
        model: nn.Module = getattr(import_module(module), name)(*args, **kwargs)
        return model

    return made


def _enlarging() -> dict[str, Network]:
    windows = {"img_size": 32, "embed_dim": 24, "window_size": 8, "upsampler": "pixelshuffle", "upscale": 2}
    unet = {"width": 16, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "Compact": ("Compact.Compact", {"num_feat": 24, "num_conv": 4}),
        "ESRGAN": ("ESRGAN.ESRGAN", {"num_filters": 24, "num_blocks": 2}),
        "HAT": ("HAT.HAT", {"depths": (2,), "num_heads": (3,), "squeeze_factor": 4, **windows}),
        "NAFNet": ("NAFNet.NAFNet", unet),
        "RCAN": ("RCAN.RCAN", {"n_resgroups": 2, "n_resblocks": 2, "n_feats": 32}),
        "RealPLKSR": ("PLKSR.RealPLKSR", {"dim": 24, "n_blocks": 2, "upscaling_factor": 2}),
        "SPAN": ("SPAN.SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 24}),
        "SwinIR": ("SwinIR.SwinIR", {"depths": [2, 2], "num_heads": [3, 3], **windows}),
    }
    path = "spandrel.architectures"
    return {f"spandrel.{name}": (_of(f"{path}.{at}", **kwargs), _IMAGE) for name, (at, kwargs) in found.items()}


def _brain_signals() -> dict[str, Network]:
    names = ("BIOT", "Deep4Net", "EEGConformer", "EEGNeX", "EEGNet", "ShallowFBCSPNet", "SleepStagerChambon2018")
    recorded = {"n_chans": 8, "n_outputs": 3, "n_times": 800, "sfreq": 200}
    return {f"braindecode.{name}": (_of(f"braindecode.models.{name}", **recorded), _SCALP) for name in names}


def _sound() -> dict[str, Network]:
    coded = {"dimension": 16, "n_filters": 8, "ratios": [4, 2], "lstm": 1, "norm": "none"}
    levels = {"encoder_dim": 8, "encoder_rates": [2, 4], "decoder_dim": 32, "decoder_rates": [4, 2]}
    codes = {"n_codebooks": 2, "codebook_size": 16}
    frames = {"input_channels": 20, "dim": 32, "intermediate_dim": 64, "num_layers": 2}
    return {
        "dac.DAC": (_of("dac.model.DAC", **levels, **codes), _SOUND),
        "denoiser.Demucs": (_of("denoiser.demucs.Demucs", hidden=8, depth=3, resample=1), (1, 1, 1000)),
        "encodec.SEANetEncoder": (_of("encodec.modules.seanet.SEANetEncoder", **coded), _SOUND),
        "vocos.VocosBackbone": (_of("vocos.models.VocosBackbone", **frames), (1, 20, 30)),
        "whisper.Whisper": (_whisper, lambda: (torch.randn(1, 20, 60), torch.randint(0, 50, (1, 7)))),
    }


def _whisper() -> nn.Module:
    models = import_module("whisper.model")
    model: nn.Module = models.Whisper(models.ModelDimensions(20, 30, 32, 4, 2, 50, 20, 32, 4, 2))
    return model


def _images() -> dict[str, Network]:
    levels = {"input_channels": 1, "n_stages": 3, "features_per_stage": [8, 16, 24], "strides": [1, 2, 2]}
    norms = {"norm_op": nn.InstanceNorm2d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}
    convolutions = {"conv_op": nn.Conv2d, "kernel_sizes": 3, "conv_bias": True, "n_conv_per_stage": 2}
    seen = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "out_chans": 16}
    return {
        "compressai.Cheng2020Attention": (_of("compressai.models.Cheng2020Attention", 16), _PHOTO),
        "compressai.ScaleHyperprior": (_of("compressai.models.ScaleHyperprior", 16, 24), _PHOTO),
        "doctr.textnet_tiny": (_of("doctr.models.classification.textnet_tiny", pretrained=False), _PHOTO),
        "dynamic_network_architectures.PlainConvUNet": (
            _of("dynamic_network_architectures.architectures.unet.PlainConvUNet", num_classes=3,
                n_conv_per_stage_decoder=1, **levels, **norms, **convolutions),
            (1, 1, 32, 32),
        ),
        "efficientnet_pytorch.EfficientNet": (_efficient, _PHOTO),
        "facenet_pytorch.InceptionResnetV1": (_of("facenet_pytorch.InceptionResnetV1"), (1, 3, 160, 160)),
        "lpips.LPIPS": (
            _of("lpips.LPIPS", net="squeeze", pnet_rand=True, verbose=False),
            lambda: (torch.randn(_PHOTO), torch.randn(_PHOTO)),
        ),
        "neuralop.FNO": (
            _of("neuralop.models.FNO", n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=16, n_layers=2),
            (1, 1, 16, 16),
        ),
        "pretrainedmodels.xception": (_of("pretrainedmodels.xception", 10, pretrained=None), (1, 3, 128, 128)),
        "resnest.resnest50": (_of("resnest.torch.resnest50", pretrained=False), _PHOTO),
        "segment_anything.ImageEncoderViT": (
            _of("segment_anything.modeling.ImageEncoderViT", use_rel_pos=True, window_size=4,
                global_attn_indexes=(1,), **seen),
            _PHOTO,
        ),
    }  # fmt: skip


def _efficient() -> nn.Module:
    model: nn.Module = import_module("efficientnet_pytorch").EfficientNet.from_name("efficientnet-b0")
    return model


def _sequences() -> dict[str, Network]:
    return {
        "mambapy.Mamba": (_mamba, (2, 8, 16)),
        "snntorch.Leaky": (_spiking, (2, 10)),
    }


def _mamba() -> nn.Module:
    mamba = import_module("mambapy.mamba")
    model: nn.Module = mamba.Mamba(mamba.MambaConfig(d_model=16, n_layers=2))
    return model


def _spiking() -> nn.Module:
    leaky = import_module("snntorch").Leaky
    layers = [nn.Linear(10, 32), leaky(beta=0.9, init_hidden=True), nn.Linear(32, 3)]
    return nn.Sequential(*layers, leaky(beta=0.9, init_hidden=True, output=True))


def _tables() -> dict[str, Network]:
    transformer = {"n_cont_features": 6, "cat_cardinalities": [3, 4], "d_out": 2, "n_blocks": 2, "d_block": 32}
    transformer |= {"attention_n_heads": 4, "attention_dropout": 0.1, "ffn_d_hidden": None, "ffn_dropout": 0.1}
    transformer |= {"ffn_d_hidden_multiplier": 1.3, "residual_dropout": 0.0}
    tabnet = {"n_d": 8, "n_a": 8, "n_steps": 3, "group_attention_matrix": torch.eye(10)}
    return {
        "kan.KAN": (
            _of("kan.KAN", width=[4, 8, 2], grid=3, k=3, auto_save=False, symbolic_enabled=False, save_act=False),
            (6, 4),
        ),
        "pytorch_tabnet.TabNet": (_of("pytorch_tabnet.tab_network.TabNet", 10, 3, **tabnet), (8, 10)),
        "rtdl_revisiting_models.FTTransformer": (
            _of("rtdl_revisiting_models.FTTransformer", **transformer),
            lambda: (torch.randn(4, 6), torch.randint(0, 3, (4, 2))),
        ),
        "stable_baselines3.ActorCriticPolicy": (_policy, (4, 6)),
        "stable_baselines3.NatureCNN": (_watching, (1, 4, 84, 84)),
    }


def _policy() -> nn.Module:
    spaces, policies = import_module("gymnasium").spaces, import_module("stable_baselines3.common.policies")
    model: nn.Module = policies.ActorCriticPolicy(spaces.Box(-1, 1, (6,)), spaces.Discrete(3), lambda _: 1e-3)
    return model


def _watching() -> nn.Module:
    spaces, layers = import_module("gymnasium").spaces, import_module("stable_baselines3.common.torch_layers")
    model: nn.Module = layers.NatureCNN(spaces.Box(0, 255, (4, 84, 84), dtype="uint8"), features_dim=64)
    return model
