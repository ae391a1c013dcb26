"""course/page.py and page.html: what the lecture page says, and what it does in a real browser."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import course.__main__
import kvsink
import quant
from course import page
from course.__main__ import main
from llama import Llama
from paper import activations
from quant import Quantizer
from support.tokenizer import Tokenizer
from tests.helpers import (
    BYTE_LEVEL,
    CHANNEL,
    EMERGENCE,
    PLANTED,
    bytes_vocabulary,
    plant,
    refuse,
    write_bpe,
    write_model,
    write_tiny,
    write_unplanted,
)

PROMPT = "The sinks \x07 are here\x0b, not there. And this is more of the text."
SINKS = [10, 20]  # of PROMPT: the bytes 7 and 11
PROSE = "\x07 prose: its only sink is the first token of all, and nothing separates its parts."


def write_page(folder, model, prompt=PROMPT, prose=PROSE):
    """Run the command on a planted model in a folder, and return the file that it writes."""
    (folder / "prose.txt").write_text(prose)
    file = folder / "sinks.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVSINK_CACHE", str(folder / "cache"))
        patch.setitem(
            kvsink.TABLE_3, str(model), kvsink.Table3Row(6, EMERGENCE - 1, 32, (CHANNEL,))
        )
        options = ["--model", str(model), "--prompt", prompt, "--data", str(folder / "prose.txt")]
        assert main(["page", str(file), *options, "--device", "cpu"]) == 0
    return file


def data_of(file):
    """Return what the page was filled with."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text())
    return json.loads(found[1])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_page(folder, write_tiny(folder / "model")[1])


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="no browser: selenium is missing")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no browser: chromium or chromedriver is missing")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    # With its sandbox, Chromium does not start as root, which one is in a container.
    for option in ("--headless=new", "--no-sandbox", "--window-size=1280,720"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, file):
    return open_page(driver, file)


def open_page(driver, file):
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(file.as_uri())
    return driver


def text_of(driver, name):
    script = "return document.getElementById(arguments[0]).textContent"
    return " ".join(driver.execute_script(script, name).split())


def press(driver, name, *keys):
    element = driver.find_element("id", name)
    driver.execute_script("arguments[0].focus()", element)
    driver.switch_to.active_element.send_keys(*keys)


def click(driver, key, words):
    """Press the button of a choice that says these words."""
    for label in driver.find_elements("css selector", f"#choose-{key} label"):
        if label.text == words:
            driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", label)
            label.click()
            return
    raise AssertionError(f"no button {words!r} in choose-{key}")


def select(driver, key, words):
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("id", f"choose-{key}")).select_by_visible_text(words)


def cells_with(driver, name):
    script = "return [...document.getElementById('cells').children].map(c => c.className)"
    return [i for i, c in enumerate(driver.execute_script(script)) if name in c.split()]


def number(words):
    """Read a number as the page writes it."""
    return float(words.replace("−", "-").replace(",", ""))


def keys(name):
    from selenium.webdriver.common.keys import Keys

    return getattr(Keys, name)


# --------------------------------------------------------------------------------------------------
# In the browser


def test_the_console_is_silent_and_the_network_is_never_asked(browser, file):
    select(browser, "text", data_of(file)["texts"][1]["title"])
    click(browser, "counts", "does not")
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"].endswith("BeSent")]
    assert asked == [file.as_uri()]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', file.read_text())[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_a_script_that_is_not_the_pages_own_does_not_run(driver, file, tmp_path):
    changed = file.read_text().replace("</body>", "<script>window.ran = 1</script></body>")
    (tmp_path / "changed.html").write_text(changed)
    open_page(driver, tmp_path / "changed.html")
    assert driver.execute_script("return window.ran") is None
    assert "Content Security Policy" in driver.get_log("browser")[0]["message"]


GROUPS = {
    "constant": [-1.7] * 5,
    "zeros": [0.0] * 4,
    "one number": [0.3],
    "huge": [0.5, -0.25, 1.0, 3e37],
    "tiny": [1e-42, 2e-42, 5e-42, 0.0],
    "negative": [-5.0, -4.5, -4.01, -4.0],
    "halves": [-1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 5.5, 7.0],
    "random": np.random.RandomState(0).standard_normal(64).tolist(),
}


@pytest.mark.parametrize("bits", range(1, 9))
def test_equations_10_to_13_give_the_numbers_of_quant(browser, file, bits):
    """For all numbers, and without those of a sink; `quantizeGroup` is what part 3 draws."""
    groups = [torch.tensor(x) for x in GROUPS.values()]
    groups += [torch.tensor(g["x"]) for g in data_of(file)["texts"][0]["blocks"][3]["keys"]]
    for X in groups:
        for left_out in ([], [0], [len(X) - 1], list(range(len(X)))):
            counts = [i not in left_out for i in range(len(X))]
            script = "return quantizeGroup(...arguments)"
            got = browser.execute_script(script, X.tolist(), counts, bits)
            mask = ~torch.tensor(counts)[:, None]
            quantizer = Quantizer(bits, "channel")
            codes, s, z = quantizer.encode(X[:, None], mask)
            assert got["codes"] == codes[:, 0].tolist()
            assert (got["s"], got["z"]) == (s.item(), z.item())
            assert got["x_"] == quantizer(X[:, None], mask)[:, 0].tolist()


def test_halves_are_rounded_to_even(browser):
    numbers = torch.arange(-9, 10) / 2
    assert browser.execute_script("return arguments[0].map(round)", numbers.tolist()) == (
        torch.round(numbers).tolist()
    )


def test_lines_15_and_16_give_the_tokens_of_predict_sinks(browser, file):
    def tokens(H_c, k):
        mask = kvsink.predict_sinks(torch.tensor(H_c)[None, :, None], 0, k)[0]
        return mask.nonzero().flatten().tolist()

    draw = np.random.RandomState(1)
    measured = [text["H_c"] for text in data_of(file)["texts"]]
    texts = [(H_c, range(1, np.count_nonzero(H_c) + 1)) for H_c in measured]  # all others are equal
    texts.append((np.abs(draw.standard_normal(64)).tolist(), range(1, 65)))  # no gap
    texts.append(([*np.geomspace(1, 1.5, 40), 15.0, 3.0, 1e4, 1e3, 999.0], range(1, 46)))
    for H_c, sizes in texts:
        for k in [*sizes, kvsink.AUTO]:
            got = browser.execute_script("return predict_sinks(...arguments)", H_c, k)
            assert got == tokens(H_c, k), k


def shades(driver):
    script = """return [...document.getElementById("cells").children].map(
        cell => Number(cell.style.getPropertyValue("--t")))"""
    return np.array(driver.execute_script(script))


def test_the_sinks_emerge_with_the_slider(browser):
    """From block l_E - 1 to l_E, the shade of the planted sinks changes, and of no other token."""
    press(browser, "block", keys("HOME"))
    assert text_of(browser, "block-says").startswith("block 1 of 6: initial")
    before = shades(browser)
    press(browser, "block", keys("ARROW_RIGHT"))
    assert text_of(browser, "block-says").startswith(f"block {EMERGENCE} of 6: emergence")
    after = shades(browser)
    assert (before != after).nonzero()[0].tolist() == SINKS
    assert (after[SINKS] > 60).all() and (np.delete(after, SINKS) == 0).all()
    sample = (
        "return getComputedStyle(document.getElementById('cells').children[%d]).backgroundColor"
    )
    browser.execute_script("document.getElementById('cells').style.setProperty('--x', 1)")
    assert browser.execute_script(sample % SINKS[0]) != browser.execute_script(sample % 0)


def test_part_1_says_what_a_token_is_and_pins_its_curve(browser, acts):
    press(browser, "cells", keys("HOME"), keys("ARROW_RIGHT") * 4)
    assert text_of(browser, "token-says").startswith("token 4 “s”: 0 after block 4")
    assert browser.find_elements("css selector", "#curves .pin") == []
    press(browser, "cells", keys("ENTER"))
    assert cells_with(browser, "pinned") == [4]
    assert len(browser.find_elements("css selector", "#curves .pin")) == 1
    cell = browser.find_element("id", f"cells-{SINKS[0]}")
    cell.click()
    assert text_of(browser, "token-says").startswith(f"token {SINKS[0]} “\\x07”: ")
    says = text_of(browser, "token-says")
    assert number(says.split()[3]) == pytest.approx(
        acts[3].H[SINKS[0], CHANNEL].abs().item(), rel=6e-3
    )
    assert says.endswith("after block 4, a sink, kept")
    assert cells_with(browser, "pinned") == [4, SINKS[0]]
    press(browser, "cells", " ")
    assert cells_with(browser, "pinned") == [4]


def test_part_1_shows_the_channel_that_is_chosen(browser, file):
    text = data_of(file)["texts"][0]
    assert text["channels"]["outlier"] == CHANNEL and "second outlier" not in text["channels"]
    click(browser, "channel", f"{text['channels']['ordinary']}, ordinary")
    assert shades(browser).max() < 20  # on the scale of channel c, it is nothing


def test_part_2_shows_the_scores_of_the_block_and_the_head(browser, file, scores):
    text = data_of(file)["texts"][0]
    n = len(text["tokens"])
    press(browser, "block", keys("END"))
    for head, P in (("all heads: the mean", scores[5].mean(0)), ("head 3", scores[5][3])):
        select(browser, "head", head)
        for row, column in ((n - 1, SINKS[0]), (n - 1, 0), (30, SINKS[1])):
            browser.execute_script("pointAt(arguments)", row, column)
            says = text_of(browser, "score-says")
            assert says.startswith(
                f"query token {row} “{text['tokens'][row]}”, key token {column} "
            )
            assert number(says.split()[-1]) == pytest.approx(P[row, column].item(), abs=0.004)
    press(browser, "scores", keys("ARROW_LEFT"), keys("ARROW_UP"))
    assert text_of(browser, "score-says").startswith(f"query token 29 “{text['tokens'][29]}”, key")
    marks = "return [...document.querySelectorAll('#map i')].map(i => parseFloat(i.style.left))"
    assert browser.execute_script(marks) == pytest.approx(
        [100 * (i + 0.5) / n for i in SINKS], abs=1e-3
    )
    share = scores[5][:, SINKS[0] + 1 :, SINKS].sum(-1).mean().item()
    select(browser, "head", "all heads: the mean")
    assert f"{100 * share:.3g} %" in text_of(browser, "see-attention")


def test_part_3_moves_with_the_switch_and_the_width(browser, file):
    """Levels, range and errors are those of quant.py."""
    group = None
    for by in ("by channel", "by token"):
        select(browser, "by", by)
        groups = data_of(file)["texts"][0]["blocks"][3]["keys"]
        group = [g for g in groups if f"by {g['by']}" == by][0]
        select(
            browser, "group", browser.find_elements("css selector", "#choose-group option")[0].text
        )
        x = torch.tensor(group["x"])
        width = len(group["channels"])
        sink = torch.tensor([i in SINKS for i in group["tokens"] for _ in range(width)])
        assert sink.any() and not sink.all()
        for bits in (8, 3, 1):
            press(browser, "n", keys("HOME"), keys("ARROW_LEFT") * (bits - 1))
            assert text_of(browser, "n-says").endswith(f": {2**bits} levels")
            for counts, words in ((True, "counts for the range"), (False, "does not")):
                click(browser, "counts", words)
                x_ = Quantizer(bits, "channel")(x[:, None], None if counts else sink[:, None])[:, 0]
                error = (x_ - x).abs()[~sink].mean().item()
                chosen = browser.find_elements("css selector", "#group-bars span.chosen")[1].text
                assert number(chosen) == pytest.approx(error, rel=6e-3)
                lo, hi = (x.amin(), x.amax()) if counts else (x[~sink].amin(), x[~sink].amax())
                says = browser.find_element("css selector", "#line text.strong").text
                assert number(says.split()[1].rstrip(":")) == pytest.approx(
                    float(hi - lo), rel=6e-3
                )
                assert len(browser.find_elements("css selector", "#line .level")) == 2**bits
                joins = len(browser.find_elements("css selector", "#line .join"))
                assert joins == (len(x) if counts else int((~sink).sum()))


def test_part_3_fills_in_the_equations(browser, file):
    press(browser, "line", keys("END"))
    group = data_of(file)["texts"][0]["blocks"][3]["keys"]
    said = text_of(browser, "filled").replace("−", "-")
    options = browser.find_elements("css selector", "#choose-group option")
    at = [option.is_selected() for option in options].index(True)
    x = torch.tensor([g for g in group if g["by"] == "channel"][at]["x"])
    s, z = Quantizer(3, "channel").parameters(x[:, None])
    code = int(quant.quantize(x[-1], s, z, 3))
    numbers = [float(number) for number in re.findall(r"= (-?[\d.]+)(?=Eq|,|$)", said)]
    expected = [s.item(), z.item(), code, quant.dequantize(torch.tensor(code), s, z).item()]
    assert numbers == pytest.approx(expected, rel=6e-3)


def test_part_4_keeps_what_the_buttons_say_and_shows_the_measured_errors(browser, file):
    text = data_of(file)["texts"][0]
    cases = [
        (("nothing", None), []),
        (("PFN", "1"), [0]),
        (("PFN", "20"), list(range(20))),
        (("KVSink", "1"), SINKS[:1]),
        (("KVSink, auto", None), SINKS),
    ]
    for (rule, N), kept in cases:
        click(browser, "rule", rule)
        if N:
            click(browser, "N", N)
        assert cells_with(browser, "kept") == kept
        name = {"nothing": "nothing", "KVSink, auto": "KVSink-auto"}.get(rule, f"{rule}-{N}")
        found = len(set(kept) & set(SINKS))
        says = f"{name} keeps " if kept else "nothing is kept"
        assert says in text_of(browser, "see-kept")
        assert f": {found} of 2 sinks." in text_of(browser, "see-kept")
        for bits in ("4", "2"):
            click(browser, "bits", bits)
            at = text["bits"].index(int(bits))
            for i in range(3):
                bar = browser.find_elements("css selector", f"#bars-{i} span.chosen")
                assert bar[0].text == name
                assert number(bar[1].text) == pytest.approx(
                    text["blocks"][3]["errors"][name][at][i]
                )
    click(browser, "rule", "KVSink, auto")
    press(browser, "block", keys("HOME"), keys("ARROW_RIGHT"))
    assert cells_with(browser, "kept") == []
    assert "Up to block 2, KVSink keeps nothing" in text_of(browser, "see-kept")


def test_on_prose_kvsink_and_pfn_keep_the_same_token(browser, file):
    assert "KVSink-1 and PFN-1 keep the same token" not in text_of(browser, "see-kept")
    select(browser, "text", data_of(file)["texts"][1]["title"])
    assert "KVSink-1 and PFN-1 keep the same token" in text_of(browser, "see-kept")
    for rule in ("PFN", "KVSink"):
        click(browser, "rule", rule)
        click(browser, "N", "1")
        assert cells_with(browser, "kept") == [0]


def test_part_5_lights_a_line_and_its_code(browser):
    def lit(name):
        found = browser.find_elements("css selector", f"#{name} .lit")
        return [element.text.split("#")[0].strip() for element in found]

    press(browser, "line-printed", keys("HOME"), keys("ARROW_DOWN") * 14)
    assert browser.find_element("css selector", "#line-printed .lit").get_attribute(
        "data-line"
    ) == ("15")
    calls = ["S_sink = predict_sinks(H, c, k)"]
    body = ["S_outliers = H[:, :, c].abs().topk(k, sorted=False).indices"]
    assert lit("line-code") == calls + body
    press(browser, "line-code", keys("HOME"))
    assert "given" in lit("line-printed")[0]
    press(browser, "equation-printed", keys("END"))
    assert lit("equation-code") == ["def zero(lo, s):", "return -torch.round(lo / s)"]


def test_the_keyboard_alone_reaches_all_of_it(browser):
    """Tab stops at every control, and each stop shows that it is one."""
    script = """const e = document.activeElement;
        const s = e.matches("input[type=radio]") ? e.nextSibling : e;
        return [e.id || e.name || e.getAttribute("href") || e.tagName,
                getComputedStyle(s).outlineStyle, parseFloat(getComputedStyle(s).outlineWidth)]"""
    browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    stops = []
    for _ in range(60):
        browser.switch_to.active_element.send_keys(keys("TAB"))
        name, style, width = browser.execute_script(script)
        if name == "BODY" or name in stops[:1]:
            break
        assert style == "solid" and width >= 2, name
        stops.append(name)
    expected = """#emergence #attention #range #kept #code # choose-text play block channel cells
        scores choose-head choose-by choose-group counts n line SUMMARY rule N bits SUMMARY
        line-printed line-code equation-printed equation-code""".split()
    assert stops == expected


def test_a_link_at_the_top_shows_one_part_alone(browser):
    visible = "[...document.querySelectorAll('section')].filter(s => s.offsetHeight)"
    for link, parts in (("3 A range", ["range"]), ("all of it", None)):
        browser.find_element("link text", link).click()
        shown = browser.execute_script(f"return {visible}.map(s => s.id)")
        assert shown == (parts or ["emergence", "attention", "range", "kept", "code"])
    curves = browser.find_element("id", "curves")  # drawn anew, as wide as there is room
    width = float(curves.get_dom_attribute("viewBox").split()[2])
    assert width == pytest.approx(curves.rect["width"], abs=1) and width > 350


def test_play_runs_through_the_blocks(browser):
    from selenium.webdriver.support.ui import WebDriverWait

    press(browser, "block", keys("HOME"))
    press(browser, "play", keys("ENTER"))
    assert text_of(browser, "play") == "Pause"
    says = "block 6 of 6"
    WebDriverWait(browser, 20).until(lambda _: text_of(browser, "block-says").startswith(says))
    WebDriverWait(browser, 20).until(lambda _: text_of(browser, "play") == "Play")


def test_no_animation_where_the_system_asks_for_none(browser):
    media = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    try:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        assert not browser.find_element("id", "play").is_displayed()
        transition = "return getComputedStyle(document.querySelector('#cells span')).transition"
        assert browser.execute_script(transition).startswith(("none", "all 0s", "all"))
        assert "0.25s" not in browser.execute_script(transition)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("width, height", [(1280, 720), (390, 844)])
def test_nothing_is_wider_than_the_screen(browser, width, height):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    try:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


HOSTILE = "</script><img/src=x/onerror=ran()>"


def test_a_hostile_text_runs_nothing(driver, tmp_path):
    """It comes as a prompt, as a file, as the model's name, and as whole tokens."""
    model = tmp_path / "<img src=x onerror=ran()>"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLANTED, "vocab_size", 310)
        plant(model)
    words = [HOSTILE[:9], HOSTILE[9:], "\u202e", "<!--"]
    write_bpe(model, bytes_vocabulary(words), {**BYTE_LEVEL, "use_regex": False})
    prompt = f"\x07{HOSTILE}\u202etxet<!--<script>{{data}} constructor\x0b __proto__"
    file = write_page(tmp_path, model, prompt, prompt)
    open_page(driver, file)
    text = data_of(file)["texts"][0]
    assert HOSTILE[9:] in text["tokens"] and "\\u202e" in text["tokens"]
    press(driver, "cells", keys("HOME"), keys("ARROW_RIGHT") * text["tokens"].index(HOSTILE[9:]))
    assert f"“{HOSTILE[9:]}”" in text_of(driver, "token-says")
    assert driver.get_log("browser") == []
    assert driver.execute_script("return [document.images.length, document.scripts.length]") == [
        0,
        2,
    ]
    assert "<img src=x" in text_of(driver, "about")


def test_a_model_without_outliers_has_a_page_that_says_so(driver, tmp_path, monkeypatch):
    write_unplanted(tmp_path / "model")
    open_page(driver, write_page(tmp_path, tmp_path / "model"))
    assert "no stable outliers" in text_of(driver, "nothing")
    visible = "[...document.querySelectorAll('section')].filter(s => s.offsetHeight)"
    assert driver.execute_script(f"return {visible}.map(s => s.id)") == ["code"]
    assert driver.get_log("browser") == []


# --------------------------------------------------------------------------------------------------
# What the page is filled with


@pytest.fixture(scope="module")
def subject(file):
    """The Subject of the page's first text."""
    with torch.no_grad():
        model = Llama.from_pretrained(file.parent / "model", dtype=torch.float32)
        tokenizer = Tokenizer.from_pretrained(file.parent / "model")
        tokens = torch.tensor([tokenizer.encode(PROMPT)])
        names = {"name": "tiny", "text": "prompt", "tokenizer": tokenizer}
        return activations.examine(model, [tokens], kvsink.Site(EMERGENCE, CHANNEL), **names)


@pytest.fixture(scope="module")
def acts(subject):
    with torch.no_grad():
        return subject.map_blocks(lambda acts: acts)


@pytest.fixture(scope="module")
def scores(subject, acts):
    with torch.no_grad():
        return [subject.scores(a) for a in acts]


def unpacked(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def test_the_numbers_on_the_page_are_the_models(file, subject, acts, scores):
    text = data_of(file)["texts"][0]
    n = len(text["tokens"])
    channels = list(text["channels"].values())
    assert text["S"] == SINKS and text["l_E"] == EMERGENCE and text["cells"] == [1, 1]
    assert torch.equal(torch.tensor(text["H_c"]), acts[EMERGENCE - 1].H[:, CHANNEL].abs())
    for block, a, P in zip(text["blocks"], acts, scores, strict=True):
        codes = unpacked(block["H"], "<u2").reshape(len(channels), n).astype(float)
        values = np.where(codes > 0, 10 ** (codes / 1000 - 20), 0)
        assert values == pytest.approx(a.H[:, channels].T.abs().numpy(), rel=2e-3)
        lower = np.tril_indices(n)
        maps = unpacked(block["heads"], "u1").reshape(len(P), -1)
        assert np.abs((maps / 255.0) ** 2 - P.numpy()[:, *lower]).max() < 0.004
        mean = unpacked(block["mean"], "u1")
        assert np.abs((mean / 255.0) ** 2 - P.mean(0).numpy()[lower]).max() < 0.004
        kept = torch.isin(torch.arange(n), torch.tensor(SINKS if a.l > EMERGENCE else []))
        errors = activations.rtn_errors(subject, a, kept, page.BITS)
        assert np.array(block["errors"]["KVSink-auto"]) == pytest.approx(np.array(errors), rel=5e-3)
        errors = activations.rtn_errors(subject, a, torch.arange(n) < 5, page.BITS)
        assert np.array(block["errors"]["PFN-5"]) == pytest.approx(np.array(errors), rel=5e-3)
        for group in block["keys"]:
            K = a.K[group["head"], group["tokens"]][:, group["channels"]]
            assert group["x"] == pytest.approx(K.flatten().tolist(), rel=1e-3)


def test_a_map_that_is_too_fine_is_drawn_by_its_largest_scores():
    P = torch.rand(2, 7, 7).tril()
    cells = unpacked(page.packed_map(P, 3), "u1")
    expected = [
        P[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].amax((1, 2))
        for i in range(3)
        for j in range(i + 1)
    ]
    assert (
        np.abs((cells.reshape(2, 6) / 255.0) ** 2 - torch.stack(expected, 1).numpy()).max() < 0.004
    )


def test_the_share_of_attention_that_goes_to_the_sinks():
    P = torch.zeros(1, 4, 4)
    P[0, 0, 0] = 1
    P[0, 1, :2] = torch.tensor([0.5, 0.5])
    P[0, 2, :3] = torch.tensor([0.2, 0.7, 0.1])
    P[0, 3] = torch.tensor([0.1, 0.3, 0.3, 0.3])
    S = torch.tensor([False, True, False, True])
    assert activations.attention_share(P, S).tolist() == pytest.approx([(0.7 + 0.6) / 2])


def test_groups_of_keys_have_a_sink_and_are_ordered_by_what_it_widens():
    K = torch.randn(5, 40, 32).clamp(-2, 2)
    S = torch.zeros(40, dtype=torch.bool)
    S[[3, 4, 20]] = True  # the group of 20 has more other tokens
    K[0, 20, 7] = 10.0
    groups = activations.key_groups(K, S)
    assert [g.head for g in groups] == [0] * 5 + [2] * 5 + [4] * 5  # a head has 2 groups by token
    by_channel = groups[:3]
    assert by_channel[0].channels == range(7, 8) and by_channel[0].tokens == range(16, 32)
    x = K[0, 16:32, 7]
    others = x[[i for i in range(16) if i != 4]]
    widened = (x.amax() - x.amin()) / (others.amax() - others.amin())
    assert by_channel[0].wider == pytest.approx(widened.item())
    assert by_channel[0].x == x.tolist()
    assert by_channel[0].wider >= by_channel[1].wider >= by_channel[2].wider
    by_token = groups[3]
    assert by_token.channels == range(16) and 20 in by_token.tokens and len(by_token.tokens) == 4
    assert by_token.x == K[0, list(by_token.tokens), :16].flatten().tolist()


def test_the_channels_that_part_1_offers():
    H = torch.ones(20, 9)
    H[:, 1:] *= torch.arange(1, 9)  # the largest magnitudes are 1, 1, 2, ... 8
    H[3, 2] = -9000.0
    S = torch.arange(20) == 3
    assert activations.shown_channels(H, S, 2) == {"outlier": 2, "ordinary": 4}
    H[3, 7] = 700.0  # a hundred times the median, 4.5, and ten times the channel's own
    assert activations.shown_channels(H, S, 2) == {"outlier": 2, "second outlier": 7, "ordinary": 4}


def test_groups_of_keys_of_a_text_that_begins_with_many_sinks():
    S = torch.arange(20) < 16  # the first whole group has no other token
    for group in activations.key_groups(torch.randn(1, 20, 8), S):
        assert np.isfinite(group.wider) and group.wider >= 1


def test_errors_of_a_block_by_hand(acts, subject):
    """By an independent NumPy: static Keys by channel, Values by token in groups of a head."""
    a = acts[3]
    K, V, Q = (X.double().numpy() for X in (a.K, a.V, a.Q))
    keep = np.isin(np.arange(K.shape[1]), SINKS)

    def quantized(X, axes, bits):
        counted = X[:, ~keep]
        lo = counted.min(axes, keepdims=True)
        s = (counted.max(axes, keepdims=True) - lo) / (2**bits - 1)
        z = -np.round(lo / s)
        X_ = s * (np.clip(np.round(X / s) + z, 0, 2**bits - 1) - z)
        X_[:, keep] = X[:, keep]
        return X_

    def attend(K, V):
        scores = Q @ np.repeat(K, 2, 0).swapaxes(1, 2) / np.sqrt(Q.shape[-1])
        P = np.exp(scores) * np.tri(len(keep))
        return P / P.sum(-1, keepdims=True) @ np.repeat(V, 2, 0)

    got = activations.rtn_errors(subject, a, torch.tensor(keep), page.BITS)
    for row, bits in zip(got, page.BITS, strict=True):
        K_ = quantized(K, (1,), bits)
        V_ = quantized(V, (1, 2), bits)  # a head of 8 channels is one group
        pairs = ((K_, K), (V_, V), (attend(K_, V_), attend(K, V)))
        expected = [np.linalg.norm(X_ - X) / np.linalg.norm(X) for X_, X in pairs]
        assert row == pytest.approx(expected, rel=0.02)
    nothing = activations.rtn_errors(subject, a, torch.tensor(keep) & False, page.BITS)
    assert all(row[0] > kept[0] for row, kept in zip(nothing, got))


def test_the_lines_of_code_are_the_files_own(file):
    code = data_of(file)["code"]
    for kind, module in (("line", kvsink), ("equation", quant)):
        source = Path(module.__file__).read_text().splitlines()
        assert all(row["text"] in source for row in code[kind])
    numbers = {n for row in code["line"] for n in row["numbers"]}
    assert numbers == set(range(1, 20))
    texts = {
        n: row["text"] for row in code["line"] for n in row["numbers"] if len(row["numbers"]) == 1
    }
    assert "block.LN_mhsa(H)" in texts[6] and "if l == l_E:" in texts[14]
    assert ".topk(k" in texts[15] and "scatter_" in texts[16]
    returns = {row["numbers"][0]: row["text"] for row in code["equation"]}
    assert [returns[n].split()[-1] for n in (13, 11)] == ["s)", "z)"]


@pytest.mark.parametrize("old, new, words", [
    ("# 14\n", "# 20\n", "line 14 is in page.html and not in kvsink.py"),
    ("# 19\n", "# 19-20\n", "line 20 is in kvsink.py and not in page.html"),
])  # fmt: skip
def test_a_number_without_a_counterpart_makes_no_page(
    old, new, words, tmp_path, monkeypatch, capsys
):
    text = Path(kvsink.__file__).read_text()
    assert text.count(old) == 1
    (tmp_path / "kvsink.py").write_text(text.replace(old, new))
    monkeypatch.setattr(kvsink, "__file__", str(tmp_path / "kvsink.py"))
    monkeypatch.setattr(page, "load_model", None)  # no weights are read
    file = tmp_path / "sinks.html"
    refuse(["page", str(file)], ["course: ", words], capsys, course.__main__)
    assert not file.exists()


@pytest.mark.parametrize("options, words", [
    (["/nowhere/sinks.html"], ["/nowhere"]),
    (["/dev/null"], ["not a file"]),
    (["--model", "lama2-7b"], ["llama2-7b"]),
    (["--data", "/nowhere/text.txt"], ["/nowhere/text.txt"]),
    (["--prompt", "x"], ["1 tokens"]),
    (["--prompt", ""], ["0 tokens"]),
    (["--prompt", "\x07\x07\x07"], ["no other token"]),
    (["--data", "SHORT"], ["1 tokens"]),
    (["--device", "toaster"], ["toaster"]),
    (["--sinks", "5"], ["--sinks"]),
])  # fmt: skip
def test_refuses_wrong_options(options, words, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "SHORT").write_text("x")
    model = str(file.parent / "model")
    monkeypatch.setitem(kvsink.TABLE_3, model, kvsink.Table3Row(6, EMERGENCE - 1, 32, (CHANNEL,)))
    given = {"--model": model, "--data": str(file.parent / "prose.txt"), "--prompt": PROMPT}
    given = [word for pair in given.items() if pair[0] not in options for word in pair]
    refuse(["page", *given, *options], ["course: ", *words], capsys, course.__main__)
    assert not (tmp_path / "sinks.html").exists()


def test_a_tokenizer_of_another_model(file, tmp_path, capsys):
    write_model(tmp_path / "model", PLANTED)
    write_bpe(tmp_path / "model", bytes_vocabulary(), {**BYTE_LEVEL})
    options = ["--model", str(tmp_path / "model"), "--data", str(file.parent / "prose.txt")]
    command = course.__main__
    refuse(
        ["page", str(tmp_path / "x.html"), *options, "--prompt", "abc"],
        ["gives id"],
        capsys,
        command,
    )


def test_the_default_model(default_model, driver, tmp_path):
    """The page of the default model stays under 3 MB, and shows what the README says."""
    file = tmp_path / "sinks.html"
    assert main(["page", str(file), "--device", "cpu"]) == 0
    assert file.stat().st_size < 3_000_000
    packed, prose = data_of(file)["texts"]
    assert len(packed["tokens"]) == 1024 and packed["l_E"] == 12
    assert {packed["tokens"][i] for i in packed["S"][1:]} == {"<|endoftext|>"}
    assert list(packed["channels"].values())[:2] == [507, 247]
    assert prose["S"] == [0]
    open_page(driver, file)
    select(driver, "text", prose["title"])
    assert "KVSink-1 and PFN-1 keep the same token" in text_of(driver, "see-kept")
    assert driver.get_log("browser") == []
