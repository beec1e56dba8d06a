"""`reroute` on a tiny random model: the report is the API's, and bad input ends in one message."""

from pathlib import Path

import pytest

from tests.cli.conftest import QUICK, Cli
from tests.cli.conftest import WORDS as VOCABULARY

pytestmark = pytest.mark.slow

WORDS = ("--answer", "She", "--foil", "He")
SMALL = ("--budget", 20, "--n", 6, "--free", "0,1")


@pytest.mark.slow
def test_reroute_writes_a_report_with_verdicts(cli: Cli, tiny: Path, colours: Path) -> None:
    import subspace_probe as sp

    result = cli(
        "reroute", "-m", tiny, "-c", colours.name, "--site", "L1.resid_post", *WORDS, *SMALL,
        "--allow", "5-20", "--ban", "7,9-10", "--out", "report", "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = sp.Report.load("report/report.json")
    (verdict,) = report.tables["verdicts"].records()
    assert verdict["site"] == "L1.resid_post"
    assert f"L1.resid_post: {verdict['verdict']}" in result.stdout
    assert report.finding("L1.resid_post.activation.met").estimate == 1.0
    tokens = report.tables["prompts"].where(level="token").records()
    given = {VOCABULARY.index(word) for row in tokens for word in row["prompt"].split()}
    used = {int(i) for row in tokens for i in row["ids"].split()}
    assert used <= (set(range(5, 21)) - {7, 9, 10}) | given
    assert all(row["rows"] <= 20 for row in tokens)
    assert "</html>" in Path("report/report.html").read_text()
    assert report.provenance.config["free"] == "0,1"


@pytest.mark.slow
def test_reroute_along_a_direction_that_was_found(cli: Cli, tiny: Path, colours: Path) -> None:
    import subspace_probe as sp

    assert cli("find", "-m", tiny, "-c", colours.name, "--site", "L0.resid_post", *QUICK[2:], "-q").exit_code == 0
    result = cli(
        "reroute", "-m", tiny, "-c", colours.name, "-d", "direction.safetensors", *WORDS, *SMALL, "-o", "report", "-q"
    )
    assert result.exit_code == 0, result.output
    report = sp.Report.load("report/report.json")
    assert report.tables["verdicts"].column("site") == ["L0.resid_post"]
    assert report.finding("L0.resid_post.activation.met").estimate == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--free", "7"), "it is too short"),
        (("--free", "lasst"), "Unknown position 'lasst'"),
        (("--allow", "5-"), "--allow '5-' is not a list of token ids"),
        (("--ban", "9-7"), "--ban '9-7' is not a list of token ids"),
        (("--allow", "5,999"), r"Tokens [999] were named"),
        (("--finder", "mean"), "Unknown finder 'mean'"),
        (("--answer", "She"), "--answer and --foil belong together"),
        (("--metric", "refusal"), "Unknown metric 'refusal'"),
    ],
)
def test_reroute_says_what_is_wrong(
    cli: Cli, tiny: Path, colours: Path, options: tuple[str, ...], message: str
) -> None:
    given = {"--free": "0", "--answer": "She", "--foil": "He", "--site": "L1.resid_post"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    if options == ("--answer", "She"):
        del given["--foil"]
    result = cli("reroute", "-m", tiny, "-c", colours.name, "--budget", 5, *[x for pair in given.items() for x in pair])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
