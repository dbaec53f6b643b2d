"""Write text with a trained language model, of train_rmc.py or train_rnn.py alike.

Example: python generate_rmc.py --words 200 --prompt "the history of"
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data_utils import EOS, UNK, Vocabulary
from layers.language_model import LanguageModel
from training import checkpoints, console, devices, files, flags, lm_training, runs
from training.console import UserError

SHOWN = 400  # characters of the text that are printed too


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = argparse.ArgumentParser(
        prog="generate_rmc.py", description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False
    )
    source = parser.add_argument_group("model")
    source.add_argument(
        "--checkpoint",
        default=None,
        metavar="FILE_OR_RUN",
        help="a checkpoint, or a run folder for its best.pt (default: the newest of a language model)",
    )
    source.add_argument(
        "--runs-folder", default="runs", metavar="FOLDER", help="where to look for it"
    )
    source.add_argument(
        "--data",
        default=None,
        metavar="FOLDER",
        help="not needed and ignored: the vocabulary is in the checkpoint",
    )
    source.add_argument("--cuda", action="store_true", help="compute on the GPU; without it on the CPU")
    source.add_argument(
        "--threads",
        type=flags.thread_count,
        default=0,
        metavar="N",
        help="CPU threads that torch may use; 0 = its own choice",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--outf",
        default="generated.txt",
        metavar="FILE",
        help="file for the text, in UTF-8; - = print all of it and write no file",
    )
    text.add_argument(
        "--words",
        type=flags.positive_int,
        default=1000,
        metavar="N",
        help="words to write per sample, ends of lines counted, the prompt not",
    )
    text.add_argument(
        "--samples", type=flags.positive_int, default=1, metavar="N", help="texts to write side by side"
    )
    text.add_argument("--prompt", default="", metavar="TEXT", help="words to begin with, separated by spaces")
    text.add_argument(
        "--log-interval",
        "--log_interval",
        type=flags.positive_int,
        default=100,
        metavar="WORDS",
        help="words between two reports of progress",
    )
    choice = parser.add_argument_group("choice of words")
    choice.add_argument(
        "--seed", type=flags.seed_int, default=1111, metavar="N", help="seed of the random choices"
    )
    choice.add_argument(
        "--temperature",
        type=flags.non_negative_float,
        default=1.0,
        metavar="X",
        help="divides the log-probabilities: below 1 safer, above 1 bolder; 0 = always the likeliest",
    )
    choice.add_argument(
        "--top-k",
        type=flags.non_negative_int,
        default=0,
        metavar="K",
        help="choose among the K likeliest words only; 0 = all",
    )
    choice.add_argument(
        "--top-p",
        type=flags.probability,
        default=1.0,
        metavar="P",
        help="choose among the likeliest words that together reach probability P; 1 = all",
    )
    choice.add_argument("--no-unk", action="store_true", help=f"never write {UNK}")
    return parser


def choose(
    log_probabilities: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    banned: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws one word per row.

    Args:
        log_probabilities: (B, V).
        temperature: divides them; 0 takes the likeliest word, and close to 0 comes to the same.
        top_k: keep only the k likeliest words, 0 for all.
        top_p: of those, keep the likeliest words up to and with the one at which their probability reaches p.
        banned: ids that are never drawn.
        generator: on the tensor's device.

    Returns:
        ids, (B,).

    Raises:
        ValueError: a value outside its range, or every word banned.
    """
    if not (0 <= temperature < math.inf and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(
            "temperature and top_k must be 0 or more, top_p above 0 and at most 1, "
            f"got {temperature}, {top_k} and {top_p}"
        )
    if len(set(banned)) >= log_probabilities.shape[1]:
        raise ValueError(f"all {log_probabilities.shape[1]} words are banned")
    scores = log_probabilities.double()  # the division by a tiny temperature needs the range
    if banned:
        scores[:, list(banned)] = -torch.inf
    # With the likeliest word at 0 every other is negative: dividing can only bring it to -inf, never to NaN.
    scores = scores - scores.max(dim=1, keepdim=True).values
    if temperature == 0:
        return scores.argmax(dim=1)
    scores, order = (scores / temperature).sort(dim=1, descending=True, stable=True)
    if top_k:
        scores[:, top_k:] = -torch.inf
    probabilities = scores.softmax(dim=1)  # after top_p they need not sum to 1, which multinomial allows
    if top_p < 1:
        before = probabilities.cumsum(dim=1) - probabilities  # of the words likelier than this one
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
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
    """Continues a text, several samples at once: the prompt in one pass, then one step per word.

    Args:
        model: in eval mode.
        start: ids that every sample begins with, at least one.
        samples: number of samples B.
        words: words to write per sample.
        choose_next: makes ids (B,) from log-probabilities (B, V).
        tick: called after each word with the number done; False stops.

    Returns:
        the new ids, (B, words) or, when stopped, fewer.
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
    """Words as text: spaces between words, a new line for `<eos>`."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word == EOS:
            lines.append([])
        else:
            lines[-1].append(word)
    return "\n".join(" ".join(line) for line in lines)


def encode_prompt(prompt: str, vocabulary: Vocabulary) -> list[int]:
    """Ids of the prompt; unknown words become `<unk>`, with a warning, if there are known ones too."""
    words = prompt.split()
    unknown = [word for word in dict.fromkeys(words) if word not in vocabulary.index]
    if unknown and UNK in vocabulary.index and len(unknown) < len(set(words)):
        console.warn(f"not in the model's vocabulary, read as {UNK}: {' '.join(unknown)}")
        return vocabulary.encode(words, allow_unknown=True)
    return vocabulary.encode(words)


def find_model(args: argparse.Namespace) -> Path:
    """The checkpoint to use; says which when the user did not."""
    if args.checkpoint is not None:
        return lm_training.find_checkpoint(args.checkpoint)
    run = runs.newest_run(args.runs_folder, lm_training.SCRIPTS)
    if run is None:
        raise UserError(
            f"no trained model: no run of a language model in {args.runs_folder} has a best.pt. "
            "Train one first (python train_rmc.py), or name one with --checkpoint."
        )
    print(f"checkpoint: {run / 'best.pt'}, the newest of a language model in {args.runs_folder}")
    return run / "best.pt"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    args = build_parser().parse_args(argv)
    if args.data is not None:
        print("--data is ignored: the vocabulary comes with the checkpoint")
    path = find_model(args)
    if args.outf != "-" and (Path(args.outf).is_dir() or not Path(args.outf).absolute().parent.is_dir()):
        raise UserError(f"--outf must be a file in a folder that is there, got {args.outf}.")
    device = devices.choose_device(args.cuda, args.threads)
    model, vocabulary = lm_training.load_model(checkpoints.load_checkpoint(path), device)
    prompt = encode_prompt(args.prompt, vocabulary)
    banned = [vocabulary.index[UNK]] if args.no_unk and UNK in vocabulary.index else []
    if len(banned) == len(vocabulary):
        raise UserError(f"--no-unk leaves nothing to write: {UNK} is the only word of this model.")
    # A text begins where a line has ended.
    start = ([vocabulary.index[EOS]] if EOS in vocabulary.index else [] if prompt else [0]) + prompt
    generator = torch.Generator(device).manual_seed(args.seed)

    def choose_next(log_probabilities: torch.Tensor) -> torch.Tensor:
        return choose(log_probabilities, args.temperature, args.top_k, args.top_p, banned, generator)

    with console.Interrupts() as interrupts, console.Progress(args.words, "writing", unit="word") as progress:

        def tick(done: int) -> bool:
            progress.advance()
            if done % args.log_interval == 0:
                progress.report(f"{done * args.samples:,} words")
            return interrupts.requested is None

        ids = generate(model, start, args.samples, args.words, choose_next, tick).tolist()
    texts = [to_text(vocabulary.decode(prompt + row)) for row in ids]
    if args.samples > 1:
        texts = [f"=== sample {number} ===\n{text}" for number, text in enumerate(texts, 1)]
    text = "\n\n".join(texts) + "\n"
    with contextlib.suppress(AttributeError):  # whatever the terminal's encoding, the words are UTF-8
        sys.stdout.reconfigure(encoding="utf-8")
    if args.outf == "-":
        print(text, end="")
    else:
        files.atomic_write(args.outf, lambda file: file.write(text.encode("utf-8", errors="surrogatepass")))
        print(text[:SHOWN].rstrip() + (" ..." if len(text) > SHOWN else ""))
        print(f"{len(ids[0]) * len(ids):,} words written to {args.outf}")
    return interrupts.exit_status


if __name__ == "__main__":
    console.run_script(main, "--samples")
