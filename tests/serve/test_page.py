"""The page in a real browser: what a person types is shown as text, with the score of every token and the decision."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from tests.serve.live import live

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on the path: the page is not tried in a browser"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="no playwright: nothing drives the browser"),
]
PROMPT = "Tell me <img src=x onerror=\"document.title='hacked'\">\nhow a 😀 volcano <b>works</b> </script> please"


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "Browser") -> "Iterator[Page]":
    page = browser.new_page()
    page.set_default_timeout(20_000)
    yield page
    page.close()


def visit(page: "Page", address: str, prompt: str) -> tuple[list[str], list[str]]:
    """Score a prompt; what the console said, and what was fetched."""
    said: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(address)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Score").click()
    page.locator("#answer, #error").and_(page.locator(":not([hidden])")).wait_for()
    return said, fetched


def test_a_prompt_is_scored_and_shown_as_text(page: "Page") -> None:
    from tests.serve.stub import StubGuard, score_of

    with live(StubGuard()) as address:
        said, fetched = visit(page, address, PROMPT)
        assert said == []
        assert {url.removeprefix(address) for url in fetched if not url.startswith("data:")} == {"/", "/v1/tokens"}
    answer = StubGuard().token_scores(PROMPT)
    shown = page.locator(".token").all_text_contents()
    assert [text.replace("↵\n", "\n") for text in shown] == [answer.text[a:b] for a, b in answer.spans]
    assert page.locator("#text").text_content() == answer.text.replace("\n", "↵\n")
    assert page.locator("#text img, #text b, #text script").count() == 0
    assert page.title() == "latent guard"
    assert page.locator(".token.decides").text_content() == "please"
    decision = "✕ flagged" if score_of(PROMPT) > 0.75 else "✓ not flagged"
    assert page.locator("#badge").text_content() == decision
    assert f"Score {score_of(PROMPT):.4g}" in (page.locator("#sentence").text_content() or "")
    assert "at most 1 %" in (page.locator("#promise").text_content() or "")
    assert page.locator("#categories tr").all_text_contents()[0].startswith("harmful")
    assert "violence/graphic" in (page.locator("#unjudged").text_content() or "")
    colours = page.locator(".token").evaluate_all(
        "marks => marks.map((mark) => getComputedStyle(mark).backgroundColor)"
    )
    for colour, score in zip(colours, answer.scores, strict=True):
        above = colour.startswith("rgba(213") or colour.startswith("rgb(213")
        assert above is (score > 0.75) or colour.endswith(", 0)")


def test_by_keyboard_alone(page: "Page") -> None:
    from tests.serve.stub import StubGuard

    with live(StubGuard()) as address:
        page.goto(address)
        page.keyboard.press("Tab")
        page.keyboard.type("one two three")
        page.keyboard.press("Control+Enter")
        page.locator("#answer:not([hidden])").wait_for()
        for _ in range(2):  # over the button, to the tokens
            page.keyboard.press("Tab")
        for _ in range(3):
            page.keyboard.press("ArrowLeft")
        assert (page.locator("#readout").text_content() or "").startswith('Token 1 of 5: "<user>"')
        assert page.locator(".token.current").text_content() == "<user>"


def test_it_asks_for_the_token_when_the_server_does(page: "Page") -> None:
    from tests.serve.stub import StubGuard

    with live(StubGuard(), token="open") as address:
        visit(page, address, "one")
        assert "asks for a token" in (page.get_by_role("alert").text_content() or "")
        assert page.locator("#answer").is_hidden()
        page.keyboard.type("open")  # the field has the focus
        page.keyboard.press("Enter")
        page.locator("#answer:not([hidden])").wait_for()
        assert page.get_by_role("alert").count() == 0


def test_what_is_unusual_is_shown_too(page: "Page") -> None:
    """Tokens that share a character, one without any, no single token that decides, an abstention, no threshold."""
    from subspace_probe.guard.judgements import Judgement, TokenScores
    from tests.serve.stub import StubGuard

    class Unusual(StubGuard):
        def judge(self, texts: Sequence[str], /) -> list[Judgement]:
            return [Judgement(-1.0, 0.25, False, True, 0.0) for _ in texts]

        def token_scores(self, prompt: str, /) -> TokenScores:
            return TokenScores(
                "a😀b c", ((0, 0), (0, 1), (1, 2), (1, 2), (2, 3), (4, 5)), (0.0, 1.0, 2.0, 3.0, -4.0, 0.5), -1
            )

        def describe(self) -> dict[str, Any]:
            return super().describe() | {"threshold": None, "calibrated": None, "layers": [1]}

    with live(Unusual()) as address:
        said, _ = visit(page, address, "one")
    assert said == []
    assert page.locator(".token").all_text_contents() == ["▯", "a", "😀", "▯", "b", "c"]
    assert page.locator("#text").text_content() == "▯a😀▯b c"
    assert page.locator(".decides").count() == 0
    assert "mean state over all tokens" in (page.locator("#reading").text_content() or "")
    assert page.locator("#badge").text_content() == "? abstains"
    assert page.locator("#abstains").is_visible()
    assert "nothing is promised" in (page.locator("#promise").text_content() or "")
    assert "boundary 0; probability 0.25 (not calibrated)" in (page.locator("#sentence").text_content() or "")
    assert "bound counts groups" not in (page.locator("#evidence").text_content() or "")


def test_a_bound_that_counts_groups_says_so(page: "Page") -> None:
    from tests.serve.stub import StubGuard

    class Grouped(StubGuard):
        def describe(self) -> dict[str, Any]:
            facts = super().describe()
            return facts | {"threshold": facts["threshold"] | {"grouped": True}}

    with live(Grouped()) as address:
        visit(page, address, "one")
    assert "(bound counts groups)" in (page.locator("#evidence").text_content() or "")


def test_errors_are_shown_as_text(page: "Page") -> None:
    from tests.serve.stub import StubGuard

    with live(StubGuard()) as address:
        visit(page, address, "too long")
        assert "longer than the context" in (page.get_by_role("alert").text_content() or "")


def test_nothing_else_runs(page: "Page") -> None:
    """The control of the policy: a script that was put into the page on its way does not run."""
    from tests.serve.stub import StubGuard

    def tampered(route: Any) -> None:
        response = route.fetch()
        body = response.text().replace("</main>", "</main><script>document.title = 'hacked'</script>")
        route.fulfill(response=response, body=body)

    with live(StubGuard()) as address:
        page.route(f"{address}/", tampered)
        said, _ = visit(page, address, "one")
    assert page.title() == "latent guard"
    assert any("Content Security Policy" in text for text in said), json.dumps(said)
