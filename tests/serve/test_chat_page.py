"""The chat page in a real browser: send, stream, stop, copy, Chinese; and model output that stays text."""
import json

import pytest

pytest.importorskip("fastapi", reason="fastapi is not here: see dev_requirements")
pytest.importorskip("uvicorn", reason="uvicorn is not here: see dev_requirements")

from medllm.data.formats import Turn  # noqa: E402
from medllm.models.sampling import Sampling  # noqa: E402
from medllm.serve.guard import Keys  # noqa: E402
from medllm.serve.queue import AnswerQueue  # noqa: E402
from medllm.serve.server import Service, chat_page  # noqa: E402
from medllm.serve.lifecycle import ServeChoice, running  # noqa: E402

KEY = "one-key-for-the-ward"


@pytest.fixture
def served(chat, request):
    "A server of its own for each test: address and service."
    service = Service(chat, AnswerQueue(chat, rows=2, waiting=0), "tiny")
    keys = Keys(getattr(request, "param", []))
    with running(service, ServeChoice(port=0), keys, log=lambda line: None) as url: yield url, service
    service.queue.close()


def wait(browser, true, seconds=20):
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, seconds, .02).until(lambda _: true())


def opened(browser, url, length=12):
    "The page, greedy and short; nothing may have gone wrong in it."
    browser.get_log("browser")                                # what earlier tests left
    browser.get(url)
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    browser.execute_script("document.getElementById('temperature').value = 0; "
        f"document.getElementById('length').value = {length}")
    return lambda css: browser.find_elements("css selector", css)


def texts(browser):
    "What stands in the conversation."
    return [(e.get_attribute("class").split()[0], e.find_element("css selector", "pre").get_attribute("textContent"))
        for e in browser.find_elements("css selector", "article")]


def ended(browser):
    "Whether no answer is on its way."
    return browser.find_element("id", "send").is_enabled() and not browser.find_elements("css selector", ".running")


def test_a_conversation_in_chinese(browser, served, chat):
    "Sent by Enter and by the button; the second question goes with the first one's answer."
    from selenium.webdriver.common.keys import Keys as Key
    find = opened(browser, served[0])
    assert "Not medical advice" in browser.find_element("id", "disclaimer").text
    field = browser.find_element("id", "question")
    field.send_keys("高血压患者平时应该注意什么？")
    field.send_keys(Key.SHIFT, Key.ENTER)
    field.send_keys("谢谢")
    field.send_keys(Key.ENTER)
    wait(browser, lambda: len(find("article")) == 2 and ended(browser))
    first = "高血压患者平时应该注意什么？\n谢谢"
    greedy = lambda *turns: chat.answers([chat.prompt([Turn(r, t) for r, t in zip(("user", "assistant")*9, turns)])],
        Sampling(12, 0.0))[0].text
    said = greedy(first)
    assert texts(browser) == [("user", first), ("assistant", said)] and field.get_attribute("value") == ""
    field.send_keys("<b>And at night?</b>")
    browser.find_element("id", "send").click()
    wait(browser, lambda: len(find("article")) == 4 and ended(browser))
    assert texts(browser)[3] == ("assistant", greedy(first, said, "<b>And at night?</b>")) and not find("article b")
    assert "longest length" in find(".note")[-1].text or "截断" in find(".note")[-1].text


def test_enter_that_chooses_a_word_does_not_send(browser, served):
    "An input method for Chinese ends a composition with Enter."
    find = opened(browser, served[0])
    browser.execute_script("""const q = document.getElementById('question'); q.value = 'ni';
        q.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}));""")
    assert find("article") == [] and browser.find_element("id", "question").get_attribute("value") == "ni"
    browser.execute_script("""document.getElementById('question').dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', isComposing: false, bubbles: true, cancelable: true}));""")
    wait(browser, lambda: len(find("article")) == 2 and ended(browser))


def test_stream_and_stop(browser, served):
    "Text grows while the model writes; Stop ends it here and in the server, and what was said stays."
    find = opened(browser, served[0], 900)
    browser.find_element("id", "question").send_keys("孩子发烧时什么情况需要马上去医院？\n")
    length = lambda: len(find("article.assistant pre")[0].get_attribute("textContent")) if find("article.assistant") else 0
    wait(browser, lambda: length() > 5)
    early = length()
    wait(browser, lambda: length() > early)
    assert served[1].queue.count == 1 and not browser.find_element("id", "send").is_enabled()
    browser.find_element("id", "stop").click()
    wait(browser, lambda: ended(browser))
    wait(browser, lambda: served[1].queue.count == 0, 5)
    assert length() > early and find(".note")[-1].text in ("stopped", "已停止")
    assert not browser.find_element("id", "stop").is_displayed()
    browser.execute_script("document.getElementById('length').value = 5")
    browser.find_element("id", "question").send_keys("然后呢？\n")                # and the conversation goes on from there
    wait(browser, lambda: len(find("article")) == 4 and ended(browser))
    assert not find(".error")


def test_copy_and_new(browser, served):
    find = opened(browser, served[0])
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    browser.find_element("id", "question").send_keys("什么是哮喘？\n")
    wait(browser, lambda: find(".copy") and ended(browser))
    find(".copy")[0].click()
    wait(browser, lambda: find(".copy")[0].text in ("Copied", "已复制"))
    assert browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == texts(browser)[1][1]
    browser.find_element("id", "new").click()
    assert find("article") == []


def test_what_goes_wrong_is_said(browser, served, chat):
    "A full house, a conversation that is too long, a server that is gone: a sentence each, and the question comes back."
    from medllm.serve.queue import QueuedRequest
    find = opened(browser, served[0])
    field = browser.find_element("id", "question")
    blocks = [QueuedRequest(chat.prompt([Turn("user", "x")]), Sampling(900, 0.0), 0, (), lambda piece: None) for _ in range(2)]
    served[1].queue.ask(blocks)
    field.send_keys("什么是哮喘？\n")
    wait(browser, lambda: find(".error") and ended(browser))
    assert find(".error")[-1].text[:15] in ("The server is b", "服务器繁忙，请稍后再试。")
    assert field.get_attribute("value") == "什么是哮喘？"
    for block in blocks: block.cancel()
    wait(browser, lambda: served[1].queue.count == 0, 5)
    browser.execute_script("arguments[0].value = 'fever '.repeat(3000)", field)
    browser.find_element("id", "send").click()
    wait(browser, lambda: len(find(".error")) == 2 and ended(browser))
    assert "context is 1024 tokens" in find(".error")[-1].text
    served[1].stopping = True
    browser.execute_script("arguments[0].value = '?'", field)
    browser.find_element("id", "send").click()
    wait(browser, lambda: len(find(".error")) == 3 and ended(browser))
    assert "stopping" in find(".error")[-1].text


def test_words_of_a_model_are_not_run(browser, served, monkeypatch):
    "A model that writes HTML: it is shown as it was written; and a script in the page is stopped by its policy."
    evil = "<img src=x onerror='window.hit = 1'><script>window.hit = 1</script>"
    page, policy = chat_page("tiny", "line")
    chat_page.cache_clear()
    monkeypatch.setattr("medllm.serve.server.chat_page", lambda *words: (page.replace("</main>", f"</main>{evil}"), policy))
    browser.get(served[0])
    assert browser.execute_script("return window.hit") is None
    body = json.dumps({"choices": [{"index": 0, "delta": {"content": evil}, "finish_reason": "stop"}]})
    browser.execute_script(f"window.fetch = async () => new Response('data: ' + {json.dumps(body)} + '\\n\\ndata: [DONE]\\n\\n')")
    browser.find_element("id", "question").send_keys("x\n")
    wait(browser, lambda: len(texts(browser)) == 2 and ended(browser))
    assert texts(browser)[1][1] == evil and browser.execute_script("return window.hit") is None


@pytest.mark.parametrize("served", [[KEY]], indirect=True)
def test_a_page_with_a_key(browser, served):
    "Opened with the key as password; its questions carry the key too."
    url = served[0]
    browser.get(url)
    assert not browser.find_elements("id", "question")
    browser.get(url.replace("http://", f"http://anna:{KEY}@"))
    browser.get(url)                                          # fetch does not like a page with a password in its address
    find = opened(browser, url)
    browser.find_element("id", "question").send_keys("什么是哮喘？\n")
    wait(browser, lambda: len(find("article")) == 2 and ended(browser))
    assert texts(browser)[1][1] and not find(".error")


def test_a_phone(browser, served):
    "Nothing is wider than the screen, and nobody else is asked for anything."
    screen = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        find = opened(browser, served[0])
        browser.find_element("id", "question").send_keys("word"*60 + "\n")
        wait(browser, lambda: len(find("article")) == 2 and ended(browser))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        asked = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert all(name.startswith(served[0]) for name in asked), asked
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
