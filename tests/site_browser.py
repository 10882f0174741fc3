"""A headless Chromium without a network, and what it can be asked about a page."""

import json
import shutil
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
PHONE = 390  # pixels

# What MathJax has not set: 0 on a page without formulas. An error of TeX is a node of its own.
UNSET = """return [...document.querySelectorAll('.math')].filter(
    e => !e.querySelector('mjx-container') || e.querySelector('mjx-merror, [data-mjx-error]')).length"""
SET = "return document.querySelectorAll('mjx-container').length"
IMAGES = "return document.querySelectorAll('article img').length"
HIDDEN = """return [...document.images].filter(e => !e.complete || !e.naturalWidth).map(e => e.src)"""
LOADED = "return [...document.images].every(e => e.complete)"
WIDTH = "return document.documentElement.scrollWidth"
RESULTS = "return [...document.querySelectorAll('#search-results li a')].map(e => [e.textContent, e.href])"

# The least contrast of the text on a page, as WCAG 2 defines it, with the text that has it. What lies behind
# a text is the first ancestor with a colour of its own.
CONTRAST = r"""
const parse = colour => colour.match(/[\d.]+/g).map(Number);
const light = rgb => { const [r, g, b] = rgb.map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = e => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0.5) return c.slice(0, 3); } return [255, 255, 255]; };
let least = [100, ''];
const walk = document.createTreeWalker(document.querySelector(arguments[0]), NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || !e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
    const pair = [parse(getComputedStyle(e).color).slice(0, 3), behind(e)].map(light);
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < least[0]) least = [ratio, text];
}
return [...least, light(behind(document.querySelector(arguments[0])))];"""


def missing():
    """What of a browser and its driver this machine lacks, in words; empty if nothing."""
    found = {"Chromium": any(map(shutil.which, BROWSERS)), "its driver": bool(shutil.which("chromedriver"))}
    return " and ".join(name for name, there in found.items() if not there)


class Browser:
    def __init__(self, profile):
        options = webdriver.ChromeOptions()
        options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        self.driver.get("about:blank")
        self.requests()  # those of the browser's own first page

    def open(self, path, width=1400, scheme="light", patience=20):
        """Show a file at a width in pixels, and wait for its formulas and pictures."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(path.as_uri())
        self.wait(lambda: self.ask(LOADED) and self.ask(UNSET) == 0, patience)

    def ask(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition, seconds):
        """True once the condition holds, False if it does not in this time."""
        try:
            return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: condition())
        except TimeoutException:
            return False

    def requests(self):
        """How many addresses were asked for since the last call, and those that are no file here."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return len(sent), [url for url in sent if urlsplit(url).scheme not in ("file", "data", "blob")]

    def errors(self):
        """What the page wrote to the console as an error since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def close(self):
        self.driver.quit()
