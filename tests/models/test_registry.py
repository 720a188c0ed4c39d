"""A family of models is one file: what it declares is all that the rest of the package knows."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatchcase
from itertools import permutations

import pytest

from dlmctl.models.architecture import all_families, architecture, family_named, recognised_family
from dlmctl.records.errors import DataError
from dlmctl.settings.families import FOLDER, declared_families, family_of_variant
from dlmctl.settings.models import Reading


def test_every_file_declares_a_family_under_its_name():
    files = {file.stem.replace("_", "-") for file in FOLDER.glob("*.py")} - {"--init--"}
    assert set(declared_families()) == files
    for family in all_families():
        assert family_named(family.name) is family
        assert family.title
        assert len(declared_families()[family.name].summary) > 20


def test_no_two_families_recognise_one_config():
    for one, other in permutations(all_families(), 2):
        for kind in one.model_types:
            assert not any(fnmatchcase(kind, pattern) for pattern in other.model_types)


def test_no_two_families_make_models_of_one_name():
    variants = [v for family in declared_families().values() for v in family.variants]
    assert len(set(variants)) == len(variants)
    assert family_of_variant("qwen2.5-vl") == "vlm"
    assert family_of_variant("dream") == "dream"


@pytest.mark.parametrize(
    ("raw", "family"),
    [
        ({"model_type": "Dream"}, "dream"),
        ({"model_type": "a2d-qwen3", "is_causal": True}, "a2d"),
        ({"model_type": "qwen3", "is_causal": False}, "a2d"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"], "is_causal": False}, "mlm"),
        ({"model_type": "qwen2_5_vl"}, "vlm"),
        ({"model_type": "qwen3"}, "ar"),
        ({}, "ar"),
    ],
)
def test_a_config_is_recognised_by_its_type_then_by_its_class(raw, family):
    assert recognised_family(raw).name == family


@pytest.mark.parametrize("name", ["x" * 200, ["llada"], {"llada": 1}])
def test_a_family_that_does_not_exist_is_refused(name):
    with pytest.raises(DataError, match=r"there is no family .* there are a2d, ar, "):
        architecture({"model_type": "llama", "dlmctl": {"family": name}}, "config.json")
    with pytest.raises(DataError, match="there is no family 'none'"):
        architecture({"model_type": "llama"}, "config.json", Reading("none"))


def test_names_of_families_need_no_torch():
    program = "import sys, dlmctl.settings.small; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"set()\n"


@pytest.mark.parametrize("mask_id", ["", False, -1, 2.0, "2"])
def test_a_mask_token_that_is_no_token_id_is_refused(mask_id):
    with pytest.raises(DataError, match="are not whole numbers"):
        architecture(
            {"model_type": "llama", "is_causal": False, "mask_token_id": mask_id}, "config.json"
        )
