"""The README's picture: the four lines of the algorithm, and the curves of a run."""

import json

import pytest
import readme_picture
from matplotlib.image import imread


def test_the_code_is_that_of_the_package():
    assert readme_picture.code_lines() == [
        "mean = x.mean(...)",
        "variance = ((x - mean) ** 2).mean(...)",
        "x_hat = (x - mean) / (variance + epsilon).sqrt()",
        "return gamma * x_hat + beta",
    ]
    assert len(readme_picture.ALGORITHM) == 4


def test_it_draws_a_run(tmp_path):
    epochs = [
        {"norm": norm, "epoch": epoch, "test_acc": 0.9 + epoch / 100}
        for norm in readme_picture.NAMES
        for epoch in (1, 2)
    ]
    metrics, out = tmp_path / "metrics.json", tmp_path / "picture.png"
    metrics.write_text(json.dumps({"epochs": epochs}))
    assert readme_picture.main([str(metrics), "--out", str(out)]) == 0
    assert imread(out).std() > 0
    assert sorted(tmp_path.iterdir()) == [metrics, out]


@pytest.mark.parametrize("text", [None, "{", "{}", "[]"])
def test_what_is_no_run_is_one_line(text, tmp_path, capsys):
    metrics = tmp_path / "metrics.json"
    if text is not None:
        metrics.write_text(text)
    assert readme_picture.main([str(metrics), "--out", str(tmp_path / "p.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(metrics) in line
    assert not (tmp_path / "p.png").exists()
