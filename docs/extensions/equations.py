r"""Equations as docstrings write them, in plain text that `help()` shows, turned into LaTeX for the site.

    u_t(x | z) = (alpha'_t - alpha_t beta'_t / beta_t) z + (beta'_t / beta_t) x

becomes `u_{t}(x \mid z) = \left(\dot{\alpha}_{t} - \alpha_{t} \frac{\dot{\beta}_{t}}{\beta_{t}}\right) z + ...`. A line with a word
that is no name of mathematics is not an equation, which tells equations from prose.
"""

import re

GREEK = ["alpha", "beta", "gamma", "delta", "epsilon", "eta", "theta", "kappa", "lambda", "mu", "nu", "pi", "rho", "sigma", "tau", "phi"]
GREEK += ["psi", "omega", "Delta", "Sigma", "Psi"]
FUNCTIONS = ["exp", "log", "sin", "cos", "tan", "min", "max", "det"]
OPERATORS = [
    "div",
    "tr",
    "sg",
    "silu",
    "gelu",
    "sigmoid",
    "logit",
    "softmax",
    "clip",
    "sign",
    "angle",
    "argmin",
    "Unif",
    "Var",
    "Cov",
    "median",
]
WORDS = {name: rf"\{name}" for name in (*GREEK, *FUNCTIONS)} | {name: rf"\operatorname{{{name}}}" for name in OPERATORS}
WORDS |= {"grad": r"\nabla", "null": r"\varnothing", "infinity": r"\infty"}
WORDS |= {name: rf"\text{{ {name} }}" for name in ("and", "for", "of", "over", "if", "else", "with", "where")}
SYMBOLS = {"<=": r"\le", ">=": r"\ge", "->": r"\mapsto", "<-": r"\leftarrow", "~": r"\sim", "...": r"\dots", "..": r"\dots", "*": r"\cdot"}
LARGE = {"sum": r"\sum", "int": r"\int", "prod": r"\prod"}
TOKEN = re.compile(r"(?P<space>\s+)|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)|(?P<name>[^\W\d_]+)|(?P<symbol><=|>=|->|<-|\.\.\.?|[^\w\s]|_)")


class NotAnEquation(ValueError):
    """A text that is prose, or whose brackets do not close."""


def latex(text, names=()):
    """An equation in LaTeX.

    Args:
      text: the equation, in the notation of the docstrings.
      names: words that are names here, such as a function's parameters.
    Returns:
      LaTeX without dollars.
    Raises:
      NotAnEquation: if a word is not of mathematics, or brackets do not close.
    """
    parser = _Parser(text, names)
    written = parser.expression(end=None)
    if parser.at < len(parser.tokens):
        raise NotAnEquation(f"{parser.peek()!r} in {text!r}")
    return written


class _Parser:
    def __init__(self, text, names):
        self.text, self.names, self.at, self.tokens = text, set(names), 0, []
        for found in TOKEN.finditer(text.strip()):
            self.tokens.append((found.lastgroup, found.group()))

    def peek(self, ahead=0):
        return self.tokens[self.at + ahead][1] if self.at + ahead < len(self.tokens) else ""

    def kind(self, ahead=0):
        return self.tokens[self.at + ahead][0] if self.at + ahead < len(self.tokens) else "end"

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1][1]

    def expression(self, end):
        """Parts up to a closing bracket, with fractions."""
        parts = []
        while self.at < len(self.tokens) and self.peek() != end:
            if self.kind() == "space":
                # A pause between two equations on one line.
                if len(self.take()) >= 2 and parts:
                    parts.append(r"\qquad ")
                continue
            if self.peek() == "/":
                over = next((i for i in reversed(range(len(parts))) if parts[i].strip()), None)
                if over is None:
                    raise NotAnEquation(f"nothing before / in {self.text!r}")
                self.take()
                while self.kind() == "space":
                    self.take()
                if self.peek() in LARGE:
                    # A sum over a sum: each is all of its product.
                    begin = max((i + 1 for i, part in enumerate(parts) if part in ("=", "+", "-", ",")), default=0)
                    above = " ".join(part for part in parts[begin:] if part)
                    parts[begin:] = [rf"\frac{{{above}}}{{{self.product(end)}}}"]
                    continue
                above, below = _bare(parts[over]), _bare(self.atom())
                if below.startswith("d") and parts[over - 1 : over] == ["d"]:
                    over, above = over - 1, f"d {above}"
                parts[over:] = [rf"\frac{{{above}}}{{{below}}}"]
                continue
            parts.append(self.atom())
        return " ".join(part for part in parts if part)

    def product(self, end):
        parts = []
        while self.at < len(self.tokens) and self.peek() not in (end, "+", "-", ",", "="):
            if self.kind() == "space":
                if len(self.peek()) >= 2:
                    break
                self.take()
            else:
                parts.append(self.atom())
        return " ".join(parts)

    def atom(self):
        """One operand with its indices, or one sign."""
        kind, token = self.kind(), self.peek()
        if kind == "end":
            raise NotAnEquation(f"{self.text!r} ends too early")
        if kind == "number":
            mantissa, _, exponent = self.take().partition("e")
            return self.indexed(rf"{mantissa} \cdot 10^{{{exponent}}}" if exponent else mantissa)
        if kind == "name":
            return self.name()
        if token in "([{":
            self.take()
            close = {"(": ")", "[": "]", "{": "}"}[token]
            inner = self.expression(close)
            self.expect(close)
            opened, closed = (r"\{", r"\}") if token == "{" else (token, close)
            tall = r"\frac" in inner or r"\sum" in inner or r"\int" in inner
            return self.indexed(rf"\left{opened} {inner} \right{closed}" if tall else f"{opened}{inner}{closed}")
        if token == "<" and self.kind(1) == "name":
            self.take()
            inner = self.expression(">")
            self.expect(">")
            return self.indexed(rf"\langle {inner} \rangle")
        if token == "|":
            return self.bar()
        if token in ")]}" or token in ('"', "`", ":", "?", "!", "#", "$", "&"):
            raise NotAnEquation(f"{token!r} in {self.text!r}")
        self.take()
        return SYMBOLS.get(token, token)

    def bar(self):
        """A norm, where something follows the bar at once and a space or a bracket stands before it; else "given"."""
        before, after = self.tokens[self.at - 1][1] if self.at else " ", self.kind(1)
        self.take()
        if after in ("space", "end") or not (before.isspace() or before in "(+-/^"):
            return r"\mid"
        inner = []
        while self.peek() != "|" or self.tokens[self.at - 1][0] == "space":
            if self.at >= len(self.tokens):
                raise NotAnEquation(f"a bar does not close in {self.text!r}")
            inner.append("" if self.kind() == "space" and self.take() else self.operand())
        self.take()
        return self.indexed(rf"\lVert {' '.join(part for part in inner if part)} \rVert")

    def operand(self):
        part = self.atom()
        while self.peek() == "/" or (self.kind() == "space" and self.peek(1) == "/"):
            while self.peek() != "/":
                self.take()
            self.take()
            while self.kind() == "space":
                self.take()
            part = rf"\frac{{{_bare(part)}}}{{{_bare(self.atom())}}}"
        return part

    def name(self):
        word = self.take()
        if word == "d" and self.peek() == "/" and self.kind(1) == "name" and self.peek(1).startswith("d"):
            self.take()
            return rf"\frac{{d}}{{{self.take()}}}"
        if word == "sqrt" and self.peek() == "(":
            self.take()
            inner = self.expression(")")
            self.expect(")")
            return self.indexed(rf"\sqrt{{{inner}}}")
        if word in LARGE:
            return self.indexed(LARGE[word])
        whole = word
        for ahead in range(0, len(self.tokens), 2):
            if self.peek(ahead) != "_" or self.kind(ahead + 1) not in ("name", "number"):
                break
            whole += "_" + self.peek(ahead + 1)
        if len(word) == 1:
            written = r"\mathrm{E}" if word == "E" and self.peek() == " " else word
        elif word in WORDS:
            written = WORDS[word]
        elif word in self.names or whole in self.names or (word.isupper() and len(word) <= 5) or re.fullmatch(r"d[A-Za-z]", word):
            written = rf"\mathrm{{{word}}}" if len(word) > 2 or word.isupper() else word
        else:
            raise NotAnEquation(f"{word!r} in {self.text!r}")
        if self.peek() == "'":
            self.take()
            written = rf"\dot{{{written}}}"
        if self.peek() == "~":
            self.take()
            written = rf"\tilde{{{written}}}"
        written = self.indexed(written)
        # What follows at once is what a function is of, so f(x) is one part of a fraction.
        return f"{written} {self.atom()}" if self.peek() == "(" else written

    def indexed(self, written):
        """Sub- and superscripts."""
        below, above = [], ""
        while self.peek() in ("_", "^") and self.kind(1) != "space":
            sign = self.take()
            if self.peek() == "{":
                self.take()
                index = self.expression("}")
                self.expect("}")
            elif sign == "^" and self.peek() == "(":
                index = _bare(self.bracketed())
            elif sign == "^" and self.peek() == "-":
                self.take()
                index = "-" + self.atom()
            elif self.kind() == "name" and len(self.peek()) > 1 and self.peek() not in WORDS:
                index = rf"\mathrm{{{self.take()}}}"
            elif self.kind() == "name":
                word = self.take()
                index = WORDS.get(word, word)
            else:
                index = self.take()
            if sign == "_":
                below.append(index)
            else:
                above = index
        return written + (f"_{{{', '.join(below)}}}" if below else "") + (f"^{{{above}}}" if above else "")

    def bracketed(self):
        self.take()
        inner = self.expression(")")
        self.expect(")")
        return f"({inner})"

    def expect(self, token):
        if self.peek() != token:
            raise NotAnEquation(f"{token!r} is missing in {self.text!r}")
        self.take()


def _bare(written):
    """Without the brackets round a numerator, a denominator or an exponent."""
    for opened, closed in ((r"\left( ", r" \right)"), ("(", ")")):
        if written.startswith(opened) and written.endswith(closed):
            inner, depth = written[len(opened) : -len(closed)], 0
            for sign in re.findall(r"[()]", inner):
                depth += 1 if sign == "(" else -1
                if depth < 0:
                    return written
            return inner
    return written
