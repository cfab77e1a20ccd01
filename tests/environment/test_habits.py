"""What the repository promises beside the code: one lint everywhere, one version, a citation."""

import re
import warnings

import scratchbn.debiased
import scratchbn.masked
import scratchbn.variants

import pytest
import yaml
from helpers import REPOSITORY


def test_pre_commit_runs_the_lint_of_make_test():
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (hook,) = config["repos"][0]["hooks"]
    assert hook["entry"].split()[-1] == "lint"
    makefile = (REPOSITORY / "Makefile").read_text()
    assert re.search(r"^test: lint\n\t.* check$", makefile, re.M)
    assert (REPOSITORY / ".ci" / "run").read_text().splitlines()[-1] == "CI=true exec make test"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == scratchbn.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["references"][0]["year"] == 2015


def test_the_changes_have_this_version():
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    assert re.search(rf"^## .*\b{re.escape(scratchbn.__version__)}\b", changes, re.M)


def test_names_in_the_changes_exist():
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    layers = re.findall(r"`((?:Scratch)?\w*Batch(?:Norm|Renorm)\w*)`", changes)
    assert len(layers) > 6
    rooms = (scratchbn, scratchbn.variants, scratchbn.masked, scratchbn.debiased)
    assert [name for name in layers if not any(hasattr(room, name) for room in rooms)] == []


def test_a_warning_that_no_test_expects_is_a_fault():
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn("ours", stacklevel=1)
    with pytest.raises(UserWarning, match="unknown"):
        warnings.warn_explicit("unknown", UserWarning, "block.py", 1, "mxnet.gluon.block")
    known = "Cannot decide type for the following arguments. Consider"
    warnings.warn_explicit(known, UserWarning, "block.py", 1, "mxnet.gluon.block")
