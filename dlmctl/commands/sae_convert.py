"""`dlmctl sae-convert`: options and wiring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from dlmctl.records.files import check_free
from dlmctl.settings import Knob
from dlmctl.settings.sae import Layout


def command(
    source: Annotated[
        Path,
        Knob("Folder of SAELens, dictionary_learning or sparsify.", metavar="SAE", argument=True),
    ],
    target: Annotated[Path, Knob("Folder to write.", metavar="DIRECTORY", argument=True)],
    layout: Annotated[
        Layout,
        Knob("Library that will load the folder.", "--to"),
    ] = "saelens",
) -> None:
    """Convert a sparse autoencoder to the folder layout of another library.

    Reads the folders of SAELens (cfg.json, sae_weights.safetensors), of dictionary_learning
    (config.json, ae.pt), in which the autoencoders of DLM-Scope were released, and of sparsify
    (cfg.json, sae.safetensors). ae.pt is read as data: no code in it is run.

    Read and written are Top-K autoencoders and those with thresholds, which are JumpReLU, BatchTopK
    and Matryoshka; SAELens saves all three as jumprelu, and sparsify has none of them.

    Examples:

    dlmctl sae-convert llada-mask-topk-sae/resid_post_layer_26/trainer_2 saes/layer26-k160-mask

    dlmctl sae-convert --to sparsify saes/layer26-k160-mask layers.26
    """
    from dlmctl.sae.formats.folders import layout_of, read_sae, write_sae

    check_free(target)
    saved = read_sae(source)
    write_sae(saved, target, layout)
    sae = saved.sae
    size = f"d {sae.d_in}, {sae.d_sae} latents" + (f", k {sae.k}" if sae.k else "")
    print(
        f"dlmctl: {target}: {layout} from {layout_of(source)}, {size}",
        file=sys.stderr,
    )
