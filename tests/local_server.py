"""A real OpenAI-compatible server for the tests: llama.cpp on one CPU thread, with a tiny model of random weights.

The model is made on the spot, the same for the same seed: nothing is downloaded and there is no torch. It knows nothing
of the paper. With a JSON schema as the response format its answers are valid, because llama.cpp enforces the schema;
which of the valid answers it gives depends on the prompt and means nothing. Without a schema it answers noise.

In a test: `with local_server(tmp_path) as base_url: ...`. By hand, until Ctrl-C, to try `sp2dpo` against it:

    python tests/local_server.py --port 8712 --workdir DIR
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import gguf
import numpy as np

__all__ = ["MODEL", "Tokenizer", "local_server", "serve", "train_tokenizer", "write_model"]

MODEL: Final = "tiny-random"
"""The name that the server gives itself; it answers to any other name too."""

SLOTS: Final = 4
CONTEXT: Final = 16_384
"""Tokens that each slot holds, and that the model says it was made for."""

START_SECONDS: Final = 60.0

LAYERS, HIDDEN, HEADS, FEED_FORWARD = 1, 64, 1, 128
"""One layer and one head: a long prompt costs mostly attention, and two layers of four heads take twice as long."""

ATTENTION_SCALE: Final = 5.0
"""Standard deviation of the attention scores. Above about 2 each head looks at a few tokens, so the answer depends on
which tokens the prompt has; near 0 it averages them all and every long prompt looks alike."""

ATTENTION_OUTPUT: Final = 4.0
"""How loud the prompt is beside the last token. Lower, more prompts share one answer."""

WHOLE_PIECE_LOGIT: Final = 12.0
"""Added to the logit of tokens that are a whole word, number or run of signs.

A grammar allows every beginning of what may come next. A model without this spells `semantic` as `s`, `em`, `anti`,
`c`, pads with line breaks, and runs into the token limit.
"""

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END: Final = "<|end|>"
SPECIALS: Final = (END, "<|system|>", "<|user|>", "<|assistant|>")

CATEGORIES: Final = ("Safety", "Factuality", "Instruction", "Reasoning", "Helpfulness", "Style")
REPLIES: Final = "\n".join(
    f'{{"semantic_gap_category": "{category}", "semantic_gap_magnitude": 0.{n:02d}, '
    f'"semantic_gap_confidence": 0.{n:02d}}}'
    for category in CATEGORIES
    for n in range(100)
)
ENGLISH: Final = """
You are given a prompt and two responses, and you compare them. The first response is the preferred one; the second was
not chosen. Which of the two is better, and by how much? Do not judge the length or the style of an answer when one of
them is wrong, unsafe or unhelpful. If there is a question that asks for help with something that could hurt people,
then a good answer says no and tells why, or offers a safe way. A fact that was made up is worse than a sentence that
reads badly. Please think about what they would have wanted to know, how many of their constraints were kept, and if the
steps follow from each other. For example, write a short story about an old man who lived in a small house near the sea,
or explain to a child why the sky is blue and where the water of the rain comes from. Give your final answer as one
object only, without any other text before or after it. I think so, because it can be used over and over again; we will
see some more of it at the end. He said that she had no time, but has been there since the day it all came down. Most
new work like this must first make its own case: let us look into these three parts, each with its name, number and use.
"""

PIECE: Final = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")
"""How llama.cpp's `gpt-2` rule cuts text before it merges bytes."""


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE vocabulary: 256 bytes, one token for each merge, then the special tokens."""

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    whole: frozenset[str]

    def id_of(self, token: str) -> int:
        """The index of a token."""
        return self.tokens.index(token)


def byte_alphabet() -> list[str]:
    """The printable character that GPT-2 writes for each of the 256 bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def merged(piece: list[str], pair: tuple[str, str]) -> list[str]:
    """The piece with every neighbouring `pair` joined."""
    joined: list[str] = []
    for token in piece:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def train_tokenizer(text: str = REPLIES + ENGLISH) -> Tokenizer:
    """Merge the most frequent pair of tokens until each word, number and run of signs in `text` is one token."""
    alphabet = byte_alphabet()
    counts = Counter(piece for piece in PIECE.findall(text) if not piece.isspace())
    pieces = {piece: [alphabet[byte] for byte in piece.encode()] for piece in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for piece, tokens in pieces.items():
            for pair in pairwise(tokens):
                pairs[pair] += counts[piece]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {piece: merged(tokens, best) for piece, tokens in pieces.items()}
    joined = dict.fromkeys(left + right for left, right in merges)
    return Tokenizer(
        tokens=(*alphabet, *joined, *SPECIALS),
        merges=tuple(merges),
        whole=frozenset({END, *(tokens[0] for tokens in pieces.values())}),
    )


def random_weights(tokenizer: Tokenizer, seed: int) -> dict[str, np.ndarray]:
    """Llama weights by GGUF name. Component 0 of the hidden state is a constant: it gives each token a bias."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(0.0, scale / np.sqrt(columns), (rows, columns)).astype(np.float32)

    def from_hidden(rows: int, scale: float = 1.0) -> np.ndarray:
        weight = matrix(rows, HIDDEN, scale)
        weight[:, 0] = 0.0
        return weight

    def into_hidden(columns: int, scale: float) -> np.ndarray:
        weight = matrix(HIDDEN, columns, scale)
        weight[0] = 0.0
        return weight

    ones = np.ones(HIDDEN, dtype=np.float32)
    embedding = rng.normal(0.0, 1.0, (len(tokenizer.tokens), HIDDEN)).astype(np.float32)
    embedding[:, 0] = np.sqrt(HIDDEN)
    output = matrix(len(tokenizer.tokens), HIDDEN, scale=4.0)
    output[:, 0] = [WHOLE_PIECE_LOGIT / 2 * (token in tokenizer.whole) for token in tokenizer.tokens]
    weights = {"token_embd.weight": embedding, "output_norm.weight": ones, "output.weight": output}
    for layer in range(LAYERS):
        block = {
            "attn_norm": ones,
            "attn_q": from_hidden(HIDDEN, ATTENTION_SCALE),
            "attn_k": from_hidden(HIDDEN),
            "attn_v": from_hidden(HIDDEN),
            "attn_output": into_hidden(HIDDEN, ATTENTION_OUTPUT),
            "ffn_norm": ones,
            "ffn_gate": from_hidden(FEED_FORWARD),
            "ffn_up": from_hidden(FEED_FORWARD),
            "ffn_down": into_hidden(FEED_FORWARD, 1.0),
        }
        weights |= {f"blk.{layer}.{name}.weight": weight for name, weight in block.items()}
    return weights


def write_model(path: Path, seed: int = 0) -> None:
    """Write the whole model, tokenizer and chat template included, as one GGUF file."""
    tokenizer = train_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(MODEL)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokenizer.tokens))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in SPECIALS else gguf.TokenType.NORMAL for token in tokenizer.tokens]
    )
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    writer.add_bos_token_id(tokenizer.id_of(END))
    writer.add_eos_token_id(tokenizer.id_of(END))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in random_weights(tokenizer, seed).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wait_until_healthy(address: str) -> None:
    """Return once `/health` answers 200."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(urllib.error.URLError), urllib.request.urlopen(f"{address}/health", timeout=5.0):
            return
        time.sleep(0.05)
    raise TimeoutError(f"{address}/health did not answer within {START_SECONDS:.0f} s")


def serve(port: int, workdir: Path, seed: int, *, until_eof: bool) -> None:
    """Serve on the loopback address, print the base URL as a line of JSON, then wait for Ctrl-C or the end of stdin."""
    import xllamacpp

    workdir.mkdir(parents=True, exist_ok=True)
    model = workdir / f"{MODEL}.gguf"
    write_model(model, seed)
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.model_alias = {MODEL}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * CONTEXT
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.ui = False
    server = xllamacpp.Server(params)
    wait_until_healthy(server.listening_address)
    print(json.dumps({"base_url": f"{server.listening_address}/v1", "model": MODEL}), flush=True)
    with suppress(KeyboardInterrupt):
        if until_eof:
            sys.stdin.read()
        else:
            threading.Event().wait()


@contextmanager
def local_server(workdir: Path) -> Iterator[str]:
    """Run the server as a process of its own, yield its base URL, and stop it in the end."""
    workdir.mkdir(parents=True, exist_ok=True)
    log = workdir / "server.log"
    command = [sys.executable, __file__, "--port", "0", "--workdir", str(workdir), "--until-eof"]
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            yield first_line(process, log)["base_url"]
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str], log: Path) -> dict[str, str]:
    """What the server says of itself when it is ready. Raises with the end of its log if it dies or takes too long."""
    assert process.stdout is not None
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline()
    finally:
        watchdog.cancel()
    if not line:
        raise RuntimeError(f"the local server did not start (exit {process.wait()}):\n{log.read_text()[-2000:]}")
    return dict(json.loads(line))


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server with a tiny model of random weights.")
    parser.add_argument("--port", type=int, default=8712, help="0: any free port")
    parser.add_argument("--workdir", type=Path, required=True, help="where to write the model")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--until-eof", action="store_true", help="stop when stdin closes: no orphan if the parent dies")
    args = parser.parse_args()
    serve(args.port, args.workdir, args.seed, until_eof=args.until_eof)


if __name__ == "__main__":
    main()
