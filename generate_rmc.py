"""Generate text with a language model trained by train_rmc.py or train_rnn.py.

Example: python generate_rmc.py --words 200 --prompt "the history of"
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from training import checkpoints, console, devices, files, flags, runs
from training.console import UserError
from training.flags import option, switch

import torch

from corpora import punctuation
from data_utils import EOS, UNK, Vocabulary
from layers.language_model import LanguageModel
from tasks import language_modeling

SHOWN = 400  # characters of the text that are printed as well as written


def build_parser() -> flags.Parser:
    """Return the script's command line."""
    parser = flags.Parser("generate_rmc", __doc__)
    # fmt: off
    source = parser.add_argument_group("model")
    option(source, "--checkpoint", None, None, "FILE_OR_RUN",
           "checkpoint, or run folder whose best.pt is used (default: the newest best.pt of a language "
           "model in --runs-folder)")
    option(source, "--runs-folder", None, "runs", "FOLDER", "folder to search for the newest model")
    switch(source, "--cuda", "compute on the GPU instead of the CPU")
    option(source, "--threads", flags.thread_count, 1, "N", "CPU threads; 0 = all available cores")
    text = parser.add_argument_group("text")
    option(text, "--outf", None, "generated.txt", "FILE",
           "output file, in UTF-8; - = print the full text and write no file")
    option(text, "--words", flags.positive_int, 1000, "N",
           "words per sample, including ends of lines and without the prompt")
    option(text, "--samples", flags.positive_int, 1, "N", "number of texts to write")
    option(text, "--prompt", None, "", "TEXT",
           "first words of every text; if one is not in the vocabulary, punctuation is separated, and the "
           "prompt is lower-cased if the vocabulary has no capitals")
    switch(text, "--detokenize", "join punctuation marks to their words in the output")
    option(text, "--log-interval", flags.positive_int, 100, "WORDS", "words between two progress reports")
    choice = parser.add_argument_group("choice of words")
    option(choice, "--seed", flags.seed_int, 1111, "N", "seed of the random choices")
    option(choice, "--temperature", flags.non_negative_float, 1.0, "X",
           "divisor of the log-probabilities: below 1 = more likely words; 0 = always the most likely")
    option(choice, "--top-k", flags.non_negative_int, 0, "K", "choose among the K most likely words; 0 = all")
    option(choice, "--top-p", flags.probability, 1.0, "P",
           "choose among the fewest words whose probabilities sum to at least P; 1 = all")
    switch(choice, "--no-unk", f"never write {UNK}")
    # fmt: on
    return parser


def choose(
    log_probabilities: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    banned: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw one word per row.

    Args:
        log_probabilities: (B, V).
        temperature: divisor of the log-probabilities; 0 takes the most likely word.
        top_k: keep only the k most likely words; 0 keeps all.
        top_p: of these, keep the fewest most likely words whose probabilities sum to at least top_p.
        banned: ids that are never drawn; not all of them.
        generator: source of randomness, on the tensor's device.

    Returns:
        ids, (B,).
    """
    scores = log_probabilities.double()  # float32 overflows when divided by a tiny temperature
    if banned:
        scores = scores.index_fill(1, torch.tensor(list(banned), device=scores.device), -torch.inf)
    # With the maximum at 0, division can only give -inf, never NaN.
    scores = scores - scores.max(dim=1, keepdim=True).values
    if temperature == 0:
        return scores.argmax(dim=1)
    scores, order = (scores / temperature).sort(dim=1, descending=True, stable=True)
    if top_k:
        scores[:, top_k:] = -torch.inf
    probabilities = scores.softmax(dim=1)
    if top_p < 1:
        before = probabilities.cumsum(dim=1) - probabilities  # of the more likely words
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)  # multinomial normalizes again
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)


@torch.no_grad()
def generate(
    model: LanguageModel,
    start: Sequence[int],
    samples: int,
    words: int,
    choose_next: Callable[[torch.Tensor], torch.Tensor],
    tick: Callable[[int], bool] = lambda done: True,
) -> torch.Tensor:
    """Continue a text, several samples at once: the prompt in one pass, then one step per word.

    Args:
        model: in eval mode.
        start: ids at the start of every sample, at least one.
        samples: number of samples B.
        words: words to write per sample.
        choose_next: function from log-probabilities (B, V) to ids (B,).
        tick: called after each word with the number of words written; returning False stops.

    Returns:
        the new ids, (B, words), or fewer if stopped.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor(list(start), dtype=torch.int64, device=device).expand(samples, -1)
    state = model.initial_state(samples)
    written = []
    for done in range(1, words + 1):
        log_probabilities, state = model.log_probabilities(tokens, state)
        tokens = choose_next(log_probabilities).unsqueeze(1)
        written.append(tokens)
        if not tick(done):
            break
    return torch.cat(written, dim=1)


def to_text(words: Sequence[str]) -> str:
    """Return words as text: spaces between words, a new line for `<eos>`."""
    text = " ".join("\n" if word == EOS else word for word in words)
    return text.replace(" \n", "\n").replace("\n ", "\n")


def encode_prompt(prompt: str, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of the prompt's words.

    If a word is not in the vocabulary, the prompt is split as by `data_utils.py`, unless this makes more
    words unknown. Words that are still unknown become `<unk>`. Both give a warning.

    Raises:
        UserError: there are unknown words and the vocabulary has no `<unk>`.
    """

    def unknown(words: list[str]) -> list[str]:
        return [word for word in dict.fromkeys(words) if word not in vocabulary.index]

    words = prompt.split()
    if unknown(words):
        lower = all(word == word.lower() for word in vocabulary.words)
        separated = punctuation.separate(prompt, lower).split()
        # A text that was separated by another program, as WikiText, has few of the marks with @.
        separated = [word if word in vocabulary.index else word.strip("@") or word for word in separated]
        if separated != words and len(unknown(separated)) <= len(unknown(words)):
            words = separated
            console.warn(f"the prompt has words that are not in the vocabulary; read as: {' '.join(words)}")
    if unknown(words) and UNK in vocabulary.index:
        console.warn(f"not in the model's vocabulary, read as {UNK}: {' '.join(unknown(words))}")
    return vocabulary.encode(words, allow_unknown=True)


def find_model(args: argparse.Namespace) -> Path:
    """Return the checkpoint to use; print which one if the user named none."""
    if args.checkpoint is not None:
        return language_modeling.find_checkpoint(args.checkpoint)
    run = runs.newest_run(args.runs_folder, language_modeling.SCRIPTS)
    if run is None:
        raise UserError(
            f"no trained model: no run of a language model in {args.runs_folder} has a best.pt. "
            "Train one first (python train_rmc.py), or name one with --checkpoint."
        )
    path, data = run / "best.pt", runs.read_json(run / "args.json")["arguments"]["data"]
    console.say(f"checkpoint: {path}, trained on {data} (the newest; others: --checkpoint RUN_FOLDER)")
    return path


def write_texts(args: argparse.Namespace) -> tuple[list[str], int]:
    """Return the texts that the arguments describe, and the exit status."""
    path = find_model(args)
    device = devices.choose_device(args.cuda)
    model, vocabulary = language_modeling.load_model(checkpoints.load_checkpoint(path), device)
    devices.choose_threads(args.threads, device)
    prompt = encode_prompt(args.prompt, vocabulary)
    banned = [vocabulary.index[UNK]] if args.no_unk and UNK in vocabulary.index else []
    # A text starts after the end of a line; without <eos> and prompt, after the first word of the vocabulary.
    start = ([vocabulary.index[EOS]] if EOS in vocabulary.index else [] if prompt else [0]) + prompt
    generator = torch.Generator(device).manual_seed(args.seed)

    def choose_next(log_probabilities: torch.Tensor) -> torch.Tensor:
        return choose(log_probabilities, args.temperature, args.top_k, args.top_p, banned, generator)

    with console.Interrupts() as interrupts, console.Progress(args.words, "writing") as progress:

        def tick(done: int) -> bool:
            progress.advance()
            if done % args.log_interval == 0:
                progress.report(f"{done * args.samples:,} words")
            return interrupts.requested is None

        ids = generate(model, start, args.samples, args.words, choose_next, tick).tolist()
    texts = [to_text(vocabulary.decode(prompt + row)) for row in ids]
    return [punctuation.join(text) for text in texts] if args.detokenize else texts, interrupts.exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    args = build_parser().parse_args(argv)
    to_file = args.outf != "-"
    if to_file and (Path(args.outf).is_dir() or not Path(args.outf).absolute().parent.is_dir()):
        raise UserError(f"--outf {args.outf} is a folder, or is in a folder that does not exist.")
    # With --outf -, standard output gets the text and nothing else.
    with contextlib.nullcontext() if to_file else contextlib.redirect_stdout(sys.stderr):
        texts, status = write_texts(args)
    if args.samples > 1:
        texts = [f"=== sample {number} ===\n{text}" for number, text in enumerate(texts, 1)]
    text = "\n\n".join(texts) + "\n"
    if to_file:
        files.atomic_write(args.outf, lambda file: file.write(text.encode("utf-8", errors="surrogatepass")))
        print(text[:SHOWN].rstrip() + (" ..." if len(text) > SHOWN else ""))
        print(f"written to {args.outf}")
    else:
        print(text, end="", flush=True)
    return status


if __name__ == "__main__":
    console.run_script(main, "--samples")
