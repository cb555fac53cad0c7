"""Exported pages in a real browser: read, filtered, sorted, compared; and a hostile notebook that comes to nothing."""
import base64
import http.server
import json
import math
import threading
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from medllm.files import write_json
from medllm.records.index import export_html
from medllm.records.page import run_page

def record(runs, stage, name, loss=2.0, cells=(), **state):
    "A record that no run had to be made for."
    folder = Path(runs)/stage/name
    folder.mkdir(parents=True)
    at = lambda n: {"step": n, "loss": round(loss + 3*math.exp(-n/8), 4), "learning_rate": 1e-3*(1 - n/40)}
    steps = [at(n) for n in range(1, 41)]
    lines = [{"step": 0, "eval_loss": loss + 3}, *steps, {"step": 40, "eval_loss": loss + .1}]
    (folder/"history.jsonl").write_text("".join(json.dumps(h) + "\n" for h in lines))
    write_json(folder/"run.json", {"stage": stage, "status": "completed", "started": f"2026-11-22T1{len(name)}:00:00+00:00",
        "duration_s": loss*10, "parameters": {"seed": 42, "dataset": "mm", "learning_rate": loss/1000, "tag": name},
        "metrics": {"loss_first": loss + 3, "loss_last": loss, "eval_loss": loss + .1, "steps": 40},
        "verdict": [{"what": "training loss", "target": "lower", "measured": f"{loss}", "met": True}],
        "inputs": {
            "data": [{"name": "mm", "place": "mm.json", "sha256": {"mm.json": "ab"*32}, "licence": "MIT", "private": False}],
            "rows": [{"name": "mm", "read": 10, "kept": 9, "rejected": {"empty_answer": 1}, "truncated": {}}]}} | state)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A run"), *cells]), folder/"record.ipynb")
    return folder


EVIL = """<script>window.hit = 1; alert(1)</script> <img src=x onerror="window.hit = 1; alert(1)">
<a id="trap" href="javascript:window.hit=1">click</a> <svg onload="window.hit=1"></svg>
<iframe srcdoc="<script>parent.hit = 1</script>"></iframe> <form action="{server}/form"><button id="send">send</button></form>
<div onclick="window.hit=1" class="touch" style="position:fixed;inset:0;background:url({server}/style)">touch</div>
<img src="{server}/picture"> <link rel="stylesheet" href="{server}/sheet"> <style>@import "{server}/import";</style>
<meta http-equiv="refresh" content="0;url={server}/away"> <base href="{server}/"> <video src="{server}/video" autoplay></video>"""


def evil_cells(server):
    "The same attack through each cell and output of a notebook."
    html = EVIL.format(server=server)
    data = {"text/html": html, "text/plain": html, "application/javascript": "window.hit = 1", "text/markdown": html}
    svg = {"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' onload='window.hit=1'><script>window.hit=1</script></svg>"}
    outputs = [new_output("display_data", data={"text/html": html}), new_output("display_data", data=data),
        new_output("display_data", data={"text/markdown": html}), new_output("display_data", data=svg),
        new_output("display_data", data={"text/latex": "$$\\href{javascript:window.hit=1}{a}$$"}),
        new_output("stream", name="stdout", text=html + "\x1b[31m</script><script>window.hit=1</script>"),
        new_output("display_data", data={"image/png": '"><script>window.hit=1</script>'}),
        new_output("error", ename="E", evalue=html, traceback=[html])]
    return [new_markdown_cell(html + "\n\n[link](javascript:window.hit=1)"), new_code_cell(f"'''{html}'''", outputs=outputs)]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    "Three records, one failed, and their pages."
    runs = tmp_path_factory.mktemp("runs")
    for name, loss in (("aa", 2.0), ("bbb", 1.0)): record(runs, "sft", name, loss)
    record(runs, "rm", "c", 3.0, status="failed", reason="out of memory", note="the third")
    return export_html([runs], tmp_path_factory.mktemp("pages"))


def shown(browser):
    "Names of the pages whose rows can be seen."
    rows = browser.find_elements("css selector", "#records tbody tr")
    return [r.get_attribute("data-id") for r in rows if r.is_displayed()]


def open_page(browser, file):
    "Open by file://, as a double click does; nothing may have gone wrong in it."
    browser.get(Path(file).as_uri())
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []


def test_filters_and_order(browser, index):
    open_page(browser, index)
    assert set(shown(browser)) == {"sft-aa.html", "sft-bbb.html", "rm-c.html"}
    browser.find_element("id", "text").send_keys("memory")                            # a word of the reason
    assert shown(browser) == ["rm-c.html"] and "1 of 3" in browser.find_element("id", "count").text
    browser.find_element("id", "text").clear()
    browser.find_element("id", "text").send_keys(" ")
    browser.find_element("css selector", "#status option[value=completed]").click()
    assert set(shown(browser)) == {"sft-aa.html", "sft-bbb.html"}
    browser.find_element("css selector", "#tag option[value=aa]").click()
    assert shown(browser) == ["sft-aa.html"]
    open_page(browser, index)
    head = browser.find_element("css selector", "button[data-key=result]")
    head.click()
    assert shown(browser) == ["sft-bbb.html", "sft-aa.html", "rm-c.html"]
    head.click()
    assert shown(browser) == ["rm-c.html", "sft-aa.html", "sft-bbb.html"]
    assert head.find_element("xpath", "..").get_attribute("aria-sort") == "descending"


def test_compare(browser, index):
    open_page(browser, index)
    button = browser.find_element("id", "compare-button")
    assert not button.is_enabled()
    for name in ("sft-aa.html", "sft-bbb.html"):
        browser.find_element("css selector", f"tr[data-id='{name}'] input").click()
    button.click()
    text = browser.find_element("id", "compare").text
    assert "learning rate 0.001 0.002" in text.replace("\n", " ") and "seed" not in text, text   # what is equal is left out
    assert len(browser.find_elements("css selector", "#compare path.curve:not(.faint)")) == 2
    browser.find_element("css selector", "#compare select option[value=eval_loss]").click()
    assert len(browser.find_elements("css selector", "#compare circle[fill=currentColor][cx]")) == 4


def test_hover_reads_a_curve(browser, index):
    from selenium.webdriver.common.action_chains import ActionChains
    open_page(browser, index.parent/"sft-aa.html")
    assert "Supervised fine-tuning" in browser.find_element("css selector", "h1").text
    svg = browser.find_element("css selector", "figure.large svg")
    ActionChains(browser).scroll_to_element(svg).move_to_element_with_offset(svg, 200, 0).perform()
    tip = browser.find_element("css selector", "figure.large .tip")
    step = int(tip.text.split()[1])
    assert tip.is_displayed() and 20 < step < 40 and f"{round(2 + 3*math.exp(-step/8), 4):.4g}" in tip.text, tip.text
    assert "10.0%" in browser.find_element("id", "data-used").text              # the rejected row


def test_a_page_is_readable_without_its_script(browser, index, tmp_path):
    "A browser with scripts off draws the still curve and the whole notebook."
    page = (index.parent/"sft-aa.html").read_text()
    assert page.count("<path class=\"curve") >= 3
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get((index.parent/"sft-aa.html").as_uri())
        assert browser.find_element("css selector", "figure.large svg path").is_displayed()
        browser.find_element("css selector", "#notebook summary").click()
        assert "A run" in browser.find_element("css selector", ".notebook").text
        browser.get(index.as_uri())
        assert len(shown(browser)) == 3 and not browser.find_element("id", "text").is_displayed()
    finally: browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_phone(browser, index):
    "Nothing is wider than the screen."
    screen = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        for file in (index, index.parent/"sft-aa.html"):
            open_page(browser, file)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_hostile_notebook_is_inert(browser, tmp_path):
    "No dialog, the canary stays unset, no other address is asked, with every trap clicked."
    asked = []
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self): asked.append(self.path)
        def log_message(self, *words): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    evil = EVIL.format(server=place)
    folder = record(tmp_path/"runs", "sft", "evil", cells=evil_cells(place), reason=evil, status="failed",
        provenance={"code": {"commit": evil}}, stages=[{"name": evil, "</script><script>window.hit=1": evil}])
    state = json.loads((folder/"run.json").read_text())
    state["parameters"] |= {"note": evil, "tag": evil, "x": evil}
    write_json(folder/"run.json", state)
    try:
        index = export_html([tmp_path/"runs"], tmp_path/"pages")
        for file in (index, index.parent/"sft-evil.html"):
            open_page(browser, file)
            clicked = 0
            browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            for trap in browser.find_elements("css selector", ".notebook :is(a, button, div.touch)"):
                browser.execute_script("arguments[0].click()", trap)
                clicked += 1
            assert browser.execute_script("return window.hit") is None
            assert browser.current_url == file.as_uri() and clicked >= (0 if file == index else 4)
            left = "return document.querySelectorAll('.notebook :is(script,iframe,form,svg,link,base,video,[onclick])').length"
            assert browser.execute_script(left) == 0
    finally: server.shutdown()
    assert asked == []


def test_the_policy_holds_what_the_sanitiser_might_miss(browser, tmp_path):
    "A script put straight into a finished page is not run; the same page without the policy runs it."
    evil = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
    page = run_page(record(tmp_path, "sft", "a")).replace("</main>", f"{evil}</main>")
    start = page.index('<meta http-equiv="Content-Security-Policy"')
    bare = page[:start] + page[page.index(">", start) + 1:]
    for text, hit in ((page, None), (bare, 1)):
        (tmp_path/"page.html").write_text(text)
        browser.get((tmp_path/"page.html").as_uri())
        assert browser.execute_script("return window.hit") == hit


def test_a_huge_output_makes_a_small_page(tmp_path):
    "Fifty megabytes of output, and of colours."
    picture = base64.b64encode(b"\x89PNG" + b"\0"*10).decode()
    outputs = [new_output("stream", name="stdout", text="\x1b[31mred\x1b[0m"*3_500_000),
        new_output("display_data", data={"text/html": "<b>a</b>"*6_000_000}),
        new_output("display_data", data={"image/png": picture})]
    page = run_page(record(tmp_path, "sft", "a", cells=[new_code_cell("f()", outputs=outputs)]))
    assert len(page) < 2_000_000 and "characters are left out" in page and picture in page
