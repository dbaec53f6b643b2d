"""The Python examples of the pages run, their links lead to files, and the flags that they name exist."""

import importlib
import re
from pathlib import Path

from training import checkpoints

import pytest

from data_utils import load_corpus
from relational_rnn_models import RelationalMemoryLM
from tasks import language_modeling

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "results").glob("**/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = ("train_rmc", "train_rnn", "train_nth_farthest", "train_learning_to_execute", "generate_rmc")


def examples():
    """Return the Python blocks of all pages, below empty lines, so tracebacks show the page's lines."""
    blocks = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            lines = text.count("\n", 0, block.start(1))
            blocks.append(pytest.param(page, "\n" * lines + block[1], id=f"{page.name}:{lines + 1}"))
    return blocks


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page, code", examples())
def test_example_runs(page, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "onnxruntime" in code:
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    if "matplotlib" in code:
        monkeypatch.setenv("MPLBACKEND", "Agg")
        pytest.importorskip("matplotlib")
    if "best.pt" in code:
        words = load_corpus("tiny").vocabulary
        model = RelationalMemoryLM(len(words), embedding_size=6, head_size=5, num_heads=2)
        (tmp_path / "runs" / "tiny").mkdir(parents=True)
        contents = language_modeling.describe_model("rmc", model, words)
        checkpoints.save_checkpoint(tmp_path / "runs" / "tiny" / "best.pt", contents)
    names = {"__name__": "__main__"}
    exec(compile(code, str(page), "exec"), names)
    if "best.pt" in code:
        assert len(names["scores"]) == 10
        assert sum(names["scores"]) / -10 == pytest.approx(names["loss"].item(), rel=1e-5)
    if "games won" in code:  # it learns
        assert int(re.search(r"games won: (\d+)%", capsys.readouterr().out)[1]) > 90


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"|^\[\w+\]: (\S+)$", text, re.MULTILINE)
    for link in map("".join, links):
        if not link.startswith("http"):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_the_pages_name_exist(script):
    parser = importlib.import_module(script).build_parser()
    named = set()
    for page in PAGES:
        if page.name != "migrating.md":  # it names flags of the old port
            text = page.read_text(encoding="utf-8").replace("\\\n", " ")
            for command in re.findall(rf"\b{script}\.py([^`|#\n]*)", text):
                named |= set(re.findall(r"(?<!\S)--[a-z][\w-]*", command))
    assert named and {flag.replace("_", "-") for flag in named} <= parser._option_string_actions.keys()
