"""Networks of libraries for sound, medical images, local features and graphs, small ones of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

Takes = tuple[int, ...] | Callable[[], tuple[torch.Tensor, ...]]
Network = tuple[Callable[[], nn.Module], Takes]

_EXTRACTOR = [(32, 10, 5), (32, 3, 2), (32, 2, 2)]
_IMAGE, _SCAN, _SPECTRA, _SOUND = (1, 1, 32, 32), (1, 1, 32, 32, 32), (2, 60, 40), (1, 1, 1600)
_EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])


def networks() -> dict[str, Network]:
    """How to build each network, and what it takes."""
    return {**_torchaudio(), **_speech(), **_scans(), **_diffusion(), **_features(), **_graphs()}


def _made(path: str, *args: Any, **kwargs: Any) -> nn.Module:
    module, _, name = path.rpartition(".")
    model: nn.Module = getattr(import_module(module), name)(*args, **kwargs)
    return model


def _lengths(*shape: int, lengths: tuple[int, ...]) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(shape), torch.tensor(lengths))


def _torchaudio() -> dict[str, Network]:
    of = partial(partial, _made)
    encoder = (32, 0.0, 16, 4, 2, 4, 0.0, 64, 0.0, 0.0)
    lstm = {"channels": 8, "nfft": 1024, "depth": 4, "dconv_attn": 2, "dconv_lstm": 2, "norm_starts": 2}
    found: dict[str, Network] = {
        "Conformer": (of("torchaudio.models.Conformer", 32, 4, 64, 2, 15), _lengths(2, 50, 32, lengths=(50, 40))),
        "ConvTasNet": (of("torchaudio.models.ConvTasNet", 2, 16, 64, 3, 16, 32, 3, 2), _SOUND),
        "Wav2Letter": (of("torchaudio.models.Wav2Letter", 10, "mfcc", 40), (1, 40, 100)),
        "DeepSpeech": (of("torchaudio.models.DeepSpeech", 40, 64, 20), (2, 1, 30, 40)),
        "Emformer": (
            of("torchaudio.models.Emformer", 32, 4, 64, 2, 8, left_context_length=8, right_context_length=4),
            _lengths(2, 28, 32, lengths=(24, 16)),
        ),
        "HDemucs": (of("torchaudio.models.HDemucs", ["a", "b"], channels=8, nfft=1024, depth=4), (1, 2, 8192)),
        "HDemucs, recurrent": (of("torchaudio.models.HDemucs", ["a", "b"], **lstm), (1, 2, 8192)),
        "WaveRNN": (
            of("torchaudio.models.WaveRNN", [2, 3], 32, 6, 2, 32, 32, 3, 16, 16, 16),
            lambda: (torch.randn(1, 1, 48), torch.randn(1, 1, 16, 10)),
        ),
        "wav2vec2": (
            of("torchaudio.models.wav2vec2_model", "group_norm", _EXTRACTOR, False, *encoder, False, 0.0, 10),
            (2, 4000),
        ),
        "wav2vec2, layer norm": (
            of("torchaudio.models.wav2vec2_model", "layer_norm", _EXTRACTOR, True, *encoder, True, 0.0, None),
            (2, 4000),
        ),
    }
    return {f"torchaudio.{name}": row for name, row in found.items()}


def _speech() -> dict[str, Network]:
    of, lobes = partial(partial, _made), "speechbrain.lobes.models"
    narrow = {"channels": [32] * 4 + [96], "attention_channels": 16, "res2net_scale": 4, "se_channels": 16}
    crdnn = {"input_shape": [None, None, 40], "cnn_channels": [8, 16], "rnn_neurons": 24, "rnn_layers": 2}
    tasnet = {"n_blocks": 2, "n_repeats": 2, "bn_chan": 16, "hid_chan": 32, "skip_chan": 16, "n_filters": 32}
    sudo = {"bn_chan": 16, "num_blocks": 2, "upsampling_depth": 3, "n_filters": 32}
    return {
        "speechbrain.ECAPA_TDNN": (of(f"{lobes}.ECAPA_TDNN.ECAPA_TDNN", 40, lin_neurons=24, **narrow), _SPECTRA),
        "speechbrain.Xvector": (
            of(f"{lobes}.Xvector.Xvector", tdnn_channels=[32] * 4 + [64], lin_neurons=24),
            _SPECTRA,
        ),
        "speechbrain.CRDNN": (of(f"{lobes}.CRDNN.CRDNN", dnn_neurons=32, **crdnn), (2, 20, 40)),
        "speechbrain.ResNet": (
            of(f"{lobes}.ResNet.ResNet", 40, channels=[16, 16, 32, 32], block_sizes=[1] * 4, lin_neurons=24),
            _SPECTRA,
        ),
        "speechbrain.MaskNet": (of(f"{lobes}.conv_tasnet.MaskNet", 32, 16, 32, 3, 3, 2, 2), (1, 32, 50)),
        "speechbrain.Cnn14": (of(f"{lobes}.Cnn14.Cnn14", 64, 64), (1, 1, 128, 64)),
        "speechbrain.Sepformer": (_sepformer, (1, 32, 60)),
        "asteroid.ConvTasNet": (of("asteroid.models.ConvTasNet", 2, **tasnet), _SOUND),
        "asteroid.SuDORMRFNet": (of("asteroid.models.SuDORMRFNet", 2, **sudo), _SOUND),
        "asteroid.DPRNNTasNet": (
            of("asteroid.models.DPRNNTasNet", 2, bn_chan=16, hid_size=16, chunk_size=20, n_repeats=1, n_filters=32),
            _SOUND,
        ),
    }


def _sepformer() -> nn.Module:
    path = "speechbrain.lobes.models.dual_path"
    block = partial(_made, f"{path}.SBTransformerBlock", 1, 32, 4, 64, use_positional_encoding=True, norm_before=True)
    return _made(f"{path}.Dual_Path_Model", 32, 32, block(), block(), num_layers=1, K=20, norm="ln", num_spks=2)


def _scans() -> dict[str, Network]:
    def of(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
        return partial(_made, f"monai.networks.nets.{name}", **kwargs)

    flat = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    levels = {"channels": (8, 16, 32), "strides": (2, 2, 2)}
    tokens = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
    kernels = {"kernel_size": (3,) * 4, "strides": (1, 2, 2, 2), "upsample_kernel_size": (2,) * 3}
    found: dict[str, Network] = {
        "AutoEncoder": (of("AutoEncoder", num_res_units=2, **flat, **levels), _IMAGE),
        "VarAutoEncoder": (
            of("VarAutoEncoder", in_shape=(1, 32, 32), spatial_dims=2, out_channels=1, latent_size=8, **levels), _IMAGE
        ),
        "AttentionUnet": (of("AttentionUnet", channels=(8, 16, 32), strides=(2, 2), **flat), _IMAGE),
        "BasicUNet, 3-D": (of("BasicUNet", features=(8, 8, 16, 32, 64, 8)), _SCAN),
        "BasicUNetPlusPlus": (of("BasicUNetPlusPlus", features=(8, 8, 16, 32, 64, 8), **flat), _IMAGE),
        "Generator": (
            of("Generator", latent_shape=(8,), start_shape=(16, 4, 4), channels=(16, 8, 1), strides=(2,) * 3), (1, 8)
        ),
        "DynUNet": (of("DynUNet", filters=(8, 16, 24, 32), res_block=True, **flat, **kernels), _IMAGE),
        "EfficientNetBN": (
            of("EfficientNetBN", model_name="efficientnet-b0", pretrained=False, in_channels=1), (1, 1, 64, 64)
        ),
        "FlexibleUNet": (
            of("FlexibleUNet", in_channels=1, out_channels=2, backbone="efficientnet-b0"), (1, 1, 64, 64)
        ),
        "HighResNet": (of("HighResNet", **flat), _IMAGE),
        "MedNeXt": (of("MedNeXt", init_filters=8, kernel_size=3, **flat), _IMAGE),
        "ResNet, padded shortcuts": (
            of("ResNet", block="bottleneck", layers=[1] * 4, block_inplanes=[16, 32, 64, 128], spatial_dims=2,
               n_input_channels=1, shortcut_type="A", num_classes=3),
            (1, 1, 64, 64),
        ),
        "SegResNet, 3-D": (of("SegResNet", init_filters=16), _SCAN),
        "SegResNetVAE": (of("SegResNetVAE", input_image_size=(32, 32), init_filters=16, **flat), _IMAGE),
        "SENet154": (
            of("SENet154", layers=(1,) * 4, spatial_dims=2, in_channels=1, num_classes=3), (1, 1, 64, 64)
        ),
        "SwinUNETR": (
            of("SwinUNETR", in_channels=1, out_channels=2, depths=(1,) * 4, num_heads=(2, 4, 8, 16), window_size=4,
               feature_size=24, spatial_dims=2),
            (1, 1, 64, 64),
        ),
        "UNETR": (of("UNETR", img_size=32, feature_size=8, **flat, **tokens), _IMAGE),
        "ViT": (
            of("ViT", in_channels=1, img_size=(32, 32), patch_size=(8, 8), num_layers=2, classification=True,
               spatial_dims=2, **tokens),
            _IMAGE,
        ),
        "VNet, 3-D": (of("VNet"), _SCAN),
    }  # fmt: skip
    return {f"monai.{name}": row for name, row in found.items()}


def _diffusion() -> dict[str, Network]:
    levels = {"spatial_dims": 2, "num_res_blocks": 1, "channels": (16, 16, 32), "norm_num_groups": 8}
    levels |= {"attention_levels": (False, False, True)}
    vectors = {"channels": (16, 32), "num_res_channels": (16, 32), "num_res_layers": 1, "num_embeddings": 16}
    vectors |= {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}
    ends = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1}
    path = "monai.networks.nets"
    return {
        "monai.AutoencoderKL": (partial(_made, f"{path}.AutoencoderKL", latent_channels=4, **levels), _IMAGE),
        "monai.DiffusionModelUNet": (
            partial(_made, f"{path}.DiffusionModelUNet", in_channels=1, out_channels=1, num_head_channels=8, **levels),
            lambda: (torch.randn(_IMAGE), torch.tensor([5.0])),
        ),
        "monai.VQVAE": (partial(_made, f"{path}.VQVAE", embedding_dim=8, **ends, **vectors), _IMAGE),
    }


def _features() -> dict[str, Network]:
    backbone: dict[str, Any] = {"backbone_type": "ResNetFPN", "resolution": (8, 2)}
    backbone |= {"resnetfpn": {"initial_dim": 16, "block_dims": [16, 24, 32]}}
    return {
        "kornia.HardNet": (partial(_made, "kornia.feature.HardNet", pretrained=False), (2, 1, 32, 32)),
        "kornia.SOSNet": (partial(_made, "kornia.feature.SOSNet", pretrained=False), (2, 1, 32, 32)),
        "kornia.KeyNet": (partial(_made, "kornia.feature.KeyNet", pretrained=False), _IMAGE),
        "kornia.LoFTR, backbone": (
            partial(_made, "kornia.feature.loftr.backbone.build_backbone", backbone), (1, 1, 64, 64)
        ),
    }  # fmt: skip


def _graphs() -> dict[str, Network]:
    path, edges = "torch_geometric.nn", lambda: (torch.randn(6, 8), _EDGES)
    return {
        f"torch_geometric.{name}": (partial(_made, f"{path}.{name}", 8, 32, 3, 5), edges)
        for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN")
    }
