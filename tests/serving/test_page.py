"""The page at / in a real browser, in front of an engine that says what it is told."""

import time

import pytest
from browser import CHROMIUM, MISSING, browser
from served import Told, serving
from test_api import TEMPLATE

from deepseek_jax.text.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
THOUGHT, ANSWER = "let me see, ", "naïve <b>\n" + "a_name_without_any_place_to_break_it" * 20
ASKED = "add one <img src=x onerror=document.title='run'>"


@pytest.fixture(scope="module")
def thinker(root):
    plain = load_tokenizer(root / "checkpoints" / "tiny-v3")
    return Tokenizer(plain.backend, {"bos_token": plain.bos_token, "add_bos_token": True}, TEMPLATE)


@pytest.fixture(scope="module")
def page():
    with browser() as page:
        yield page
        assert page.thrown == []


@pytest.fixture
def told(thinker):
    """An engine that thinks and answers, and its server's address."""
    ids = [*thinker.encode(f"{THOUGHT}</think>{ANSWER}", add_bos=False), 1]
    engine = Told(lambda request, choice: ids)
    with serving(engine, thinker, drafts=True, routing=True, context=2000) as url:
        yield engine, url


def opened(page, url, **how):
    page.open(f"{url}/", **how)
    page.until("at('name').textContent === 'tiny'")


def send(page, text):
    page.run("at('box').value = ''; at('box').focus()")
    page.type(text)
    page.press("Enter")


def texts(page, selector):
    return page.run(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


def test_an_answer_streams_its_thoughts_fold_and_its_numbers_and_experts_are_shown(page, told, thinker):
    engine, url = told
    opened(page, url)
    assert "to see the experts" in page.run("at('experts').textContent")
    engine.goes_on.clear()
    page.run("at('thinking').value = 'enabled'; at('temperature').value = 0.5; at('most').value = 900")
    send(page, ASKED)
    page.until("document.querySelector('details[open] .token')")
    assert THOUGHT.startswith("".join(texts(page, ".token")))
    assert (texts(page, "#send"), texts(page, "article .said")) == (["stop"], ["writing"])
    engine.goes_on.set()
    page.until("at('send').textContent === 'send'")
    assert texts(page, "details .text") == [THOUGHT]
    assert texts(page, "article > .text") == [ANSWER]
    assert not page.run("document.querySelector('details').open")
    (said,) = texts(page, "article .said")
    assert said.startswith(f"{len(engine.says(None, 0))} tokens, ")
    assert " a second, the first after " in said
    assert f"3 of 4 drafts accepted, {len(engine.asked[0].prompt)} tokens of prompt, of which 2 were kept" in said
    assert (engine.asked[0].temperature, engine.asked[0].max_new_tokens) == (0.5, 900)
    # Experts of the engine of this test are the token's place and the one after it.
    page.hover("article > .text .token")
    at = len(engine.asked[0].prompt) + len(thinker.encode(f"{THOUGHT}</think>", add_bos=False))
    word = thinker.decode(thinker.encode(ANSWER, add_bos=False)[:1])
    assert page.run("at('experts').textContent").startswith(f'"{word}" MoE layer 0: {at} {at + 1}')
    assert texts(page, ".shown") == texts(page, ".token:hover")
    # What was typed is text, and nothing is wider than the window.
    assert texts(page, "article.user") == [ASKED]
    assert page.run("document.title") == "deepseek-jax"
    for width in (1280, 400):
        page.size(width)
        assert page.run("[document.documentElement, at('chat')].every(e => e.scrollWidth <= e.clientWidth)")
    # The next question comes after the answer, without its thoughts; a new chat begins without either.
    page.run("at('temperature').value = at('most').value = ''")
    send(page, "more")
    page.until("at('send').textContent === 'send' && messages.length === 4")
    turns = [{"role": role, "content": text} for role, text in (("user", ASKED), ("assistant", ANSWER))]
    assert engine.asked[1].prompt == thinker.chat([*turns, {"role": "user", "content": "more"}], thinking=True)
    assert engine.asked[1].temperature == 1.0
    assert engine.asked[1].max_new_tokens == 2000 - len(engine.asked[1].prompt)


def test_stopping_and_a_new_chat_leave_the_engine_and_nothing_of_the_old_one(page, told):
    engine, url = told
    opened(page, url)
    engine.goes_on.clear()
    send(page, "one")
    page.until("document.querySelector('.token')")
    page.click("#send")
    page.until("document.querySelector('article .said').textContent === 'stopped'")
    page.until("at('send').textContent === 'send'")
    send(page, "two")
    page.until("document.querySelectorAll('article.assistant .token').length > 1")
    page.click("#anew")
    page.until("at('send').textContent === 'send'")
    assert page.run("[messages.length, at('chat').childElementCount, at('box').value]") == [0, 0, ""]
    end = time.monotonic() + 20
    while engine.cancelled < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert engine.cancelled == 2


def test_what_goes_wrong_is_said_and_the_question_is_kept(page, thinker, told):
    engine, url = told
    opened(page, url, width=400, dark=True)

    def wrong(text):
        count = len(texts(page, ".wrong"))
        send(page, text)
        page.until(f"document.querySelectorAll('.wrong').length > {count} && at('send').textContent === 'send'")
        assert page.run("[messages.length, at('box').value]") == [0, text]
        return texts(page, ".wrong")[-1]

    engine.full = True
    assert wrong("one") == "2 requests are waiting, as many as may; try again later."
    engine.full = False
    page.run("at('most').value = 5000")
    assert "do not fit the context of 2000" in wrong("two")
    with serving(engine, thinker, key="secret") as locked:
        page.open(f"{locked}/")
        page.until("at('name').textContent === 'give the key'")
        assert "key" in wrong("three")
        page.run("at('key').value = 'secret'; at('key').dispatchEvent(new Event('change'))")
        page.until("at('name').textContent === 'tiny'")
        send(page, "four")
        page.until("at('send').textContent === 'send' && messages.length === 2")
    page.click("#anew")
    assert wrong("five") == f"the server at {locked.removeprefix('http://')} cannot be reached"
