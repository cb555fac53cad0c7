"use strict";
(() => {
  const WORDS = {
    en: { new: "New chat", settings: "Settings", system: "System text", temperature: "Temperature", length: "Longest answer [tokens]",
      question: "Ask something. Enter sends, Shift+Enter begins a new line.", send: "Send", stop: "Stop", copy: "Copy", copied: "Copied",
      stopped: "stopped", cut: "cut off at its longest length", busy: "The server is busy; try again in a moment.",
      lost: "The connection to the server was lost.", failed: "The server could not answer", sources: "Sources" },
    zh: { new: "新对话", settings: "设置", system: "系统提示", temperature: "温度", length: "最长回答 [token]",
      question: "请输入问题。回车发送，Shift+回车换行。", send: "发送", stop: "停止", copy: "复制", copied: "已复制",
      stopped: "已停止", cut: "达到最长长度，已截断", busy: "服务器繁忙，请稍后再试。",
      lost: "与服务器的连接已断开。", failed: "服务器无法回答", sources: "来源" },
  };
  const words = WORDS[(navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en"];
  const find = id => document.getElementById(id);
  const talk = find("talk"), question = find("question"), send = find("send"), stop = find("stop");
  let history = [], running = null;

  for (const e of document.querySelectorAll("[data-say]")) e.textContent = words[e.dataset.say];
  for (const e of document.querySelectorAll("[data-hint]")) e.placeholder = words[e.dataset.hint];

  function made(tag, text, kind) {
    const e = document.createElement(tag);
    if (text) e.textContent = text;              // text, never HTML: what a model says is not run
    if (kind) e.className = kind;
    return e;
  }

  async function copy(text, button) {
    try { await navigator.clipboard.writeText(text); }
    catch {                                      // no clipboard without https on other machines
      const area = made("textarea", "");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = words.copied;
    setTimeout(() => { button.textContent = words.copy; }, 1500);
  }

  function message(role, text) {
    const box = made("article", "", role), pre = made("pre", text), foot = made("div", "", "foot");
    box.append(pre, foot);
    talk.append(box);
    talk.scrollTop = talk.scrollHeight;
    return { box, pre, foot };
  }

  function sources(box, cited) {
    const list = made("ul", "", "sources");
    for (const c of cited) list.append(made("li", `[${c.number}] ${c.title || ""} (${c.place}): ${c.text}`));
    if (cited.length) box.append(made("p", words.sources, "foot"), list);
  }

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }

  async function refusal(response) {
    if (response.status === 429) return words.busy;
    let why = "";
    try { why = (await response.json()).error.message; } catch { /* no JSON: the status says it */ }
    return `${words.failed} (${response.status})${why ? ": " + why : ""}`;
  }

  async function read(response, shown) {
    let text = "", reason = "";
    for await (const piece of events(response)) {
      if (piece.error) throw new Error(`${words.failed}: ${piece.error.message}`);
      const choice = piece.choices[0];
      if (choice && choice.delta.content) {
        const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
        text += choice.delta.content;
        shown.pre.textContent = text;
        if (follows) talk.scrollTop = talk.scrollHeight;
      }
      if (choice && choice.finish_reason) reason = choice.finish_reason;
      if (choice && choice.finish_reason && piece.citations) sources(shown.box, piece.citations[choice.index] || []);
    }
    if (!reason) throw new Error(words.lost);
    return reason;
  }

  function wanted() {
    const system = find("system").value.trim(), length = find("length").valueAsNumber;
    const body = { model: document.body.dataset.model, stream: true, temperature: find("temperature").valueAsNumber || 0,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...history] };
    if (length > 0) body.max_tokens = length;
    return body;
  }

  async function ask() {
    const text = question.value.trim();
    if (!text || running) return;
    question.value = "";
    message("user", text);
    history.push({ role: "user", content: text });
    const shown = message("assistant", ""), mine = history;
    shown.box.classList.add("running");
    const control = running = new AbortController();
    send.disabled = true;
    stop.hidden = false;
    let note = "", failed = "";
    try {
      const response = await fetch("/v1/chat/completions", { method: "POST", signal: control.signal,
        headers: { "Content-Type": "application/json" }, body: JSON.stringify(wanted()) });
      if (!response.ok) failed = await refusal(response);
      else if (await read(response, shown) === "length") note = words.cut;
    } catch (e) {
      if (control.signal.aborted) note = words.stopped;
      else failed = e instanceof TypeError ? words.lost : e.message;
    }
    finish(shown, mine, text, note, failed);
  }

  function finish(shown, mine, asked, note, failed) {
    const text = shown.pre.textContent.trim();
    shown.box.classList.remove("running");
    if (text) {
      mine.push({ role: "assistant", content: text });
      const button = made("button", words.copy, "copy");
      button.type = "button";
      button.addEventListener("click", () => copy(text, button));
      shown.foot.append(button);
    } else {                                     // nothing was said: the question goes back to where it was written
      mine.pop();
      if (mine === history && !question.value) question.value = asked;
    }
    if (note || failed) shown.foot.append(made("span", failed || note, failed ? "error" : "note"));
    running = null;
    send.disabled = false;
    stop.hidden = true;
    question.focus();
  }

  find("form").addEventListener("submit", e => { e.preventDefault(); ask(); });
  question.addEventListener("keydown", e => {    // Enter that chooses a Chinese word in an input method does not send
    if (e.key !== "Enter" || e.shiftKey || e.isComposing || e.keyCode === 229) return;
    e.preventDefault();
    ask();
  });
  stop.addEventListener("click", () => { if (running) running.abort(); });
  find("new").addEventListener("click", () => {
    if (running) running.abort();
    history = [];
    talk.replaceChildren();
    question.focus();
  });
})();
