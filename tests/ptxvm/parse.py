"""PTX text -> Module of functions made of labels and instructions.

The parser resolves nested `{ }` scopes (registers and labels get unique names) and inlines
calls to functions defined in the module, so that a kernel body is one flat instruction list.
"""

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field, replace

from .errors import ParseError, UnsupportedOpcode

TYPE_BYTES = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "f32x2": 8,
    "b128": 16,
}


# ---- operands -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reg:
    name: str
    type: str


@dataclass(frozen=True)
class Imm:
    """A literal: an int, or a float; `bits` is 32/64 when it was written as 0f../0d.. hex bits."""

    value: object
    bits: int = 0


@dataclass(frozen=True)
class Sym:
    """A variable, label or function name, plus a constant byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Addr:
    """[base + offset] with base a Reg, Sym or None; `extra` holds tensor coordinates."""

    base: object
    offset: int = 0
    extra: tuple = ()


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Not:
    arg: object


@dataclass(frozen=True)
class Pair:
    """`a|b` destination."""

    a: object
    b: object


# ---- program --------------------------------------------------------------------------------
@dataclass
class Instr:
    op: str  # first component of the opcode: "ld", "mma", ...
    mods: tuple  # the remaining components
    args: list
    pred: object = None  # Reg
    pred_neg: bool = False
    line: int = 0
    text: str = ""
    scope: tuple = ()
    uses_target: tuple = ()  # resolved branch targets (labels)

    @property
    def opcode(self):
        return ".".join((self.op, *self.mods))

    @property
    def type(self):
        """The last type-like modifier."""
        for m in reversed(self.mods):
            if m in TYPE_BYTES:
                return m
        raise UnsupportedOpcode(f"line {self.line}: no type in '{self.text}'")

    def has(self, *mods):
        return any(m in self.mods for m in mods)


@dataclass
class Label:
    name: str
    scope: tuple = ()


@dataclass
class Var:
    name: str
    space: str
    type: str
    align: int
    size: int
    init: object = None
    extern: bool = False


@dataclass
class Function:
    name: str
    entry: bool
    params: list = field(default_factory=list)
    rets: list = field(default_factory=list)
    body: list = field(default_factory=list)
    vars: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)  # .branchtargets
    directives: dict = field(default_factory=dict)
    defined: bool = True


@dataclass
class ParsedModule:
    functions: dict
    vars: dict
    target: str


def _split(text, sep=","):
    """Split at top-level separators, respecting brackets."""
    out, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == sep and depth == 0:
            out.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    return [*out, tail] if tail else out


def _strip_comments(text):
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _number(s):
    """Literal -> Imm, or None."""
    m = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", s)
    if m:
        return Imm(int(m[1], 16), 32)
    m = re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", s)
    if m:
        return Imm(int(m[1], 16), 64)
    m = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", s)
    if m:
        digits = m[2]
        value = int(digits, 8) if re.fullmatch(r"0[0-7]+", digits) else int(digits, 0)
        return Imm(-value if m[1] else value)
    if re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?|-?\d+[eE][-+]?\d+", s):
        return Imm(float(s))
    return None


class _Scope:
    """Names declared in one `{ }` block."""

    def __init__(self, uid):
        self.uid, self.names, self.ranges = uid, {}, {}

    def find(self, name):
        if name in self.names:
            return self.names[name]
        m = re.fullmatch(r"(.*?)(\d+)", name)
        if m and m[1] in self.ranges:
            return Reg(f"{name}@{self.uid}" if self.uid else name, self.ranges[m[1]])
        return None


class _Parser:
    def __init__(self, text):
        self.lines = text.splitlines()
        self.text = _strip_comments(text)
        self.pos = 0
        self.newlines = [i for i, c in enumerate(self.text) if c == "\n"]
        self.module = ParsedModule({}, {}, "")
        self.scopes, self.next_uid = [], 0

    # -- scanning
    def line(self):
        return bisect_right(self.newlines, self.pos - 1) + 1

    def skip_space(self):
        self.pos = re.compile(r"\s*").match(self.text, self.pos).end()
        return self.pos < len(self.text)

    def take_line(self):
        end = self.text.find("\n", self.pos)
        end = len(self.text) if end < 0 else end
        s, self.pos = self.text[self.pos : end], end
        return s

    def take_until(self, stops):
        """Text up to a stop character outside parentheses; consumes the stop."""
        depth, i = 0, self.pos
        while i < len(self.text):
            c = self.text[i]
            if c == "(":
                depth += 1
            elif c == ")":
                depth -= 1
            elif c in stops and depth == 0:
                s, self.pos = self.text[self.pos : i], i + 1
                return s.strip(), c
            i += 1
        raise ParseError(f"line {self.line()}: unterminated statement")

    # -- module level
    def parse(self):
        while self.skip_space():
            rest = self.text[self.pos : self.pos + 400]
            if re.match(r"\.(version|address_size|file|loc)\s", rest):
                self.take_line()
            elif rest.startswith(".target"):
                self.module.target = self.take_line().split()[1].rstrip(",")
            elif rest.startswith(".section"):
                self.take_until("{")
                self.take_until("}")
            elif re.match(r"(\.(visible|weak|extern|common)\s+)*\.(entry|func|alias)\b", rest):
                self.function()
            elif rest[0] in ";}":
                self.pos += 1
            else:
                text, _ = self.take_until(";")
                for var in self.variables(text):
                    self.module.vars[var.name] = var
        return self.module

    def variables(self, text):
        """`.extern .shared .align 16 .b8 name[10] = {...}` -> [Var]."""
        decl, _, init = text.partition("=")
        words = re.sub(r"(?<=\w)\.", " .", decl.replace("[", " [", 1)).split()
        space, typ, align, vec, extern, i = None, None, None, 1, False, 0
        while i < len(words) and words[i].startswith("."):
            w = words[i][1:]
            if w in ("global", "const", "shared", "local", "param", "reg"):
                space = w
            elif w == "align":
                i += 1
                align = int(words[i])
            elif w in TYPE_BYTES:
                typ = w
            elif w in ("v2", "v4"):
                vec = int(w[1])
            elif w == "extern":
                extern = True
            elif w == "ptr":  # .ptr .global .align n: attributes of a kernel parameter
                while i + 1 < len(words) and words[i + 1].startswith("."):
                    i += 2 if words[i + 1] == ".align" else 1
                break
            elif w == "attribute":
                i += 1
            i += 1
        while i < len(words) and (words[i].startswith(".") or re.fullmatch(r"\d+", words[i])):
            i += 1
        if space is None or typ is None:
            raise ParseError(f"line {self.line()}: cannot parse declaration '{text}'")
        out = []
        for name in _split(" ".join(words[i:])):
            name = name.replace(" ", "")
            m = re.fullmatch(r"([\w$%]+)((?:\[\d*\])*)", name)
            count = 1
            for n in re.findall(r"\[(\d*)\]", m[2]):
                count *= int(n or 0)
            size = TYPE_BYTES[typ] * vec * count
            data = self.initial(init.strip(), typ, size) if init.strip() else None
            out.append(Var(m[1], space, typ, align or TYPE_BYTES[typ] * vec, size, data, extern))
        return out

    def initial(self, text, typ, size):
        """Initialiser -> bytes, or a list of (offset, symbol) for address initialisers (unsupported)."""
        values, out = _split(text.replace("{", "").replace("}", "")), bytearray()
        for v in values:
            imm = _number(v)
            if imm is None:
                raise UnsupportedOpcode(f"address initialiser '{v}'")
            n = TYPE_BYTES[typ]
            if isinstance(imm.value, float):
                out += struct.pack("<f" if n == 4 else "<d", imm.value)
            else:
                out += (imm.value & ((1 << 8 * n) - 1)).to_bytes(n, "little")
        return bytes(out) + bytes(max(0, size - len(out)))

    def function(self):
        head, stop = self.take_until("{;")
        m = re.search(r"\.(entry|func)\s*(\([^)]*\))?\s*([\w$%]+)\s*(\((.*?)\))?(.*)$", head, re.S)
        if not m:
            return
        f = Function(m[3], m[1] == "entry", defined=stop == "{")
        as_var = lambda s: self.variables(re.sub(r"\.reg\b", ".param", s))[0]
        f.rets = [as_var(s) for s in _split((m[2] or "()")[1:-1])]
        f.params = [as_var(s) for s in _split(m[5] or "")]
        for d, v in re.findall(r"\.(\w+)\s+([\d, ]+)", m[6] or ""):
            f.directives[d] = [int(x) for x in v.split(",") if x.strip()]
        if f.defined:
            self.body(f)
        if f.defined or f.name not in self.module.functions:
            self.module.functions[f.name] = f

    # -- function bodies
    def body(self, f):
        self.scopes, self.next_uid = [_Scope(0)], 0
        for p in f.params + f.rets:
            self.scopes[0].names[p.name] = Sym(p.name)
            f.vars[p.name] = p
        labels = {}
        label_re = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
        while self.scopes:
            if not self.skip_space():
                raise ParseError(f"{f.name}: missing closing brace")
            c = self.text[self.pos]
            chain = tuple(s.uid for s in self.scopes)
            m = label_re.match(self.text, self.pos)
            if c == "{":
                self.pos += 1
                self.next_uid += 1
                self.scopes.append(_Scope(self.next_uid))
            elif c == "}":
                self.pos += 1
                self.scopes.pop()
            elif c == ";":
                self.pos += 1
            elif m:
                self.pos = m.end()
                self.skip_space()
                if self.text.startswith(".branchtargets", self.pos):
                    text, _ = self.take_until(";")
                    f.tables[m[1]] = (_split(text[len(".branchtargets") :]), chain)
                elif self.text.startswith(".callprototype", self.pos):
                    self.take_until(";")
                else:
                    labels[(m[1], chain[-1])] = name = f"{m[1]}@{chain[-1]}"
                    f.body.append(Label(name))
            elif re.match(r"\.(loc|file)\s", self.text[self.pos : self.pos + 6]):
                self.take_line()
            elif c == ".":
                text, _ = self.take_until(";")
                self.directive(f, text)
            else:
                line = self.line()
                text, _ = self.take_until(";")
                f.body.append(self.instruction(text, line, chain))
        self.resolve_labels(f, labels)

    def directive(self, f, text):
        scope = self.scopes[-1]
        suffix = f"@{scope.uid}" if scope.uid else ""
        if text.startswith(".reg"):
            m = re.match(r"\.reg\s*\.(\w+)\s+(.*)$", text, re.S)
            for name in _split(m[2]):
                r = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
                if r:
                    scope.ranges[r[1]] = m[1]
                else:
                    scope.names[name] = Reg(name + suffix, m[1])
        elif text.startswith((".shared", ".local", ".param", ".const", ".global")):
            for v in self.variables(text):
                unique = v.name + suffix
                f.vars[unique] = replace(v, name=unique)
                scope.names[v.name] = Sym(unique)

    def lookup(self, name):
        for s in reversed(self.scopes):
            found = s.find(name)
            if found is not None:
                return found
        return None

    def operand(self, s):
        s = s.strip()
        if s[0] == "{":
            return Vec(tuple(self.operand(x) for x in _split(s[1:-1])))
        if s[0] == "[":
            parts = _split(s[1:-1])
            return replace(self.address(parts[0]), extra=tuple(self.operand(p) for p in parts[1:]))
        if s[0] == "(":
            return Vec(tuple(self.operand(x) for x in _split(s[1:-1])))
        if s[0] == "!":
            return Not(self.operand(s[1:]))
        if "|" in s:
            a, b = s.split("|")
            return Pair(self.operand(a), self.operand(b))
        imm = _number(s)
        if imm is not None:
            return imm
        found = self.lookup(s)
        if found is not None:
            return found
        if s[0] == "%":
            return Special(s[1:])
        addr = self.address(s)
        return Sym(addr.base.name, addr.offset + addr.base.offset) if isinstance(addr.base, Sym) else addr

    def address(self, s):
        m = re.fullmatch(r"(-?[\w$%.]+)\s*(?:([+-])\s*(-?(?:0[xX][0-9a-fA-F]+|\d+)))?", s.strip())
        if not m:
            raise ParseError(f"line {self.line()}: cannot parse address '{s}'")
        offset = int(m[3], 0) * (-1 if m[2] == "-" else 1) if m[3] else 0
        imm = _number(m[1])
        if imm is not None:
            return Addr(None, imm.value + offset)
        base = self.lookup(m[1]) or Sym(m[1])
        return Addr(base, offset)

    def instruction(self, text, line, chain):
        pred, neg, rest = None, False, text
        m = re.match(r"@(!?)\s*([\w$%]+)\s+", text)
        if m:
            pred, neg, rest = self.lookup(m[2]), bool(m[1]), text[m.end() :]
            if pred is None:
                raise ParseError(f"line {line}: unknown predicate in '{text}'")
        parts = rest.split(None, 1)
        op, *mods = parts[0].split(".")
        args = [self.operand(a) for a in _split(parts[1])] if len(parts) > 1 else []
        return Instr(op, tuple(mods), args, pred, neg, line, " ".join(text.split()), chain)

    def resolve_labels(self, f, labels):
        def resolve(name, chain, line):
            for uid in reversed(chain):
                if (name, uid) in labels:
                    return labels[name, uid]
            raise ParseError(f"line {line}: unknown label {name}")

        for ins in f.body:
            if isinstance(ins, Instr) and ins.op == "bra":
                ins.uses_target = (resolve(ins.args[0].name, ins.scope, ins.line),)
            elif isinstance(ins, Instr) and ins.op == "brx":
                names, chain = f.tables[ins.args[1].name]
                ins.uses_target = tuple(resolve(n, chain, ins.line) for n in names)


# ---- inlining -------------------------------------------------------------------------------
def _rename(x, prefix, syms):
    """Rename registers and callee symbols in an operand (or operand-like structure)."""
    go = lambda y: _rename(y, prefix, syms)
    if isinstance(x, Reg):
        return Reg(prefix + x.name, x.type)
    if isinstance(x, Sym):
        return Sym(syms.get(x.name, x.name), x.offset)
    if isinstance(x, Addr):
        return Addr(go(x.base), x.offset, tuple(go(e) for e in x.extra))
    if isinstance(x, Vec):
        return Vec(tuple(go(i) for i in x.items))
    if isinstance(x, Not):
        return Not(go(x.arg))
    if isinstance(x, Pair):
        return Pair(go(x.a), go(x.b))
    return x


def inline_calls(module, f, stack=()):
    """Return (body, vars) of `f` with every direct call to a defined function expanded."""
    if f.name in stack:
        raise UnsupportedOpcode(f"recursive call of {f.name}")
    body, variables, count = [], dict(f.vars), 0
    for item in f.body:
        if not (isinstance(item, Instr) and item.op == "call"):
            body.append(item)
            continue
        args = list(item.args)
        rets = args.pop(0).items if isinstance(args[0], Vec) else ()
        name = args.pop(0)
        params = args.pop(0).items if args and isinstance(args[0], Vec) else ()
        callee = module.functions.get(getattr(name, "name", None))
        if callee is None or not callee.defined:
            if callee is None:
                raise UnsupportedOpcode(f"line {item.line}: indirect call '{item.text}'")
            body.append(replace(item, op="extern_call", args=[name, *params]))
            continue
        count += 1
        prefix = f"{callee.name}#{len(stack)}.{item.line}.{count}/"
        sub_body, sub_vars = inline_calls(module, callee, (*stack, f.name))
        syms = {v.name: a.name for v, a in zip(callee.rets + callee.params, rets + params, strict=False)}
        for v in sub_vars.values():
            if v.name not in syms:
                syms[v.name] = prefix + v.name
                variables[prefix + v.name] = replace(v, name=prefix + v.name)
        end = prefix + "end"
        if item.pred is not None:  # predicated call: branch around it
            body.append(replace(item, op="bra", mods=(), pred_neg=not item.pred_neg, uses_target=(end,)))
        for sub in sub_body:
            if isinstance(sub, Label):
                body.append(Label(prefix + sub.name))
            elif sub.op == "ret":
                body.append(replace(sub, op="bra", pred=_rename(sub.pred, prefix, syms), uses_target=(end,)))
            else:
                body.append(
                    replace(
                        sub,
                        args=[_rename(a, prefix, syms) for a in sub.args],
                        pred=_rename(sub.pred, prefix, syms),
                        uses_target=tuple(prefix + t for t in sub.uses_target),
                    )
                )
        body.append(Label(end))
    return body, variables


def parse(text):
    """Parse a PTX module."""
    return _Parser(text).parse()
