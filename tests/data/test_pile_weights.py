"""examples/pile/weights: the published weights are read by The Pile's names, and learned ones only when allowed.

Run alone: python -m pytest tests/data/test_pile_weights.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_doremi.data.domain_names import read_domain_names
from megatron_doremi.data.manifest import Domain, Manifest, TokenizerInfo
from megatron_doremi.data.weights_file import load_weights
from megatron_doremi.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WEIGHTS = EXAMPLES / "pile" / "weights"
# Weights of Pile-CC, Wikipedia (en) and DM Mathematics as printed.
PRINTED = {
    "baseline": (0.1121, 0.0919, 0.0198),
    "doremi_280m": (0.6057, 0.0699, 0.0018),
    "doremi_1b": (0.1199, 0.0962, 0.0004),
    "authors_120m": (0.1379, 0.1068, 0.0019),
}


def manifest_of(tmp_path, listed):
    names = json.loads((EXAMPLES / "domains" / listed).read_text())["domains"]
    domains = tuple(Domain(name, tmp_path / "t", None, 100, 1, 400) for name in sorted(names))
    tokenizer = TokenizerInfo("SentencePieceTokenizer", tmp_path / "m", "ab" * 32, 400, 1)
    return Manifest(domains, tokenizer, tmp_path / "d.json")


@pytest.mark.parametrize("name", PRINTED)
def test_published_weights_are_read_by_name(tmp_path, name):
    manifest, path = manifest_of(tmp_path, "pile.json"), WEIGHTS / f"{name}.json"
    if name != "baseline":
        with pytest.raises(ConfigError, match="learned with a tokenizer that it does not name") as error:
            load_weights(path, manifest, False)
        assert len(error.value.faults) == 1
    vector = load_weights(path, manifest, name != "baseline")
    found = dict(zip(manifest.names, vector, strict=True))
    assert len(found) == 22
    assert sum(found.values()) == pytest.approx(1.0)
    some = [found[domain] for domain in ("Pile-CC", "Wikipedia (en)", "DM Mathematics")]
    # The printed figures sum to 1.0001.
    assert some == pytest.approx([figure / 1.0001 for figure in PRINTED[name]], rel=1e-9)


def test_regmix_names_are_those_of_the_domain_list(tmp_path):
    renames = read_domain_names(WEIGHTS / "regmix_names.json")
    manifest = manifest_of(tmp_path, "regmix.json")
    (tmp_path / "regmix.yaml").write_text("train:\n" + "".join(f"  {name}: 1.0\n" for name in renames))
    vector = load_weights(tmp_path / "regmix.yaml", manifest, False, renames=renames)
    assert vector.tolist() == pytest.approx([1 / 17] * 17)
