"""What a run of tools/preprocess_data.py wrote and skipped, as text for its user."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_doremi.console import print_stdout, warn
from megatron_doremi.data.manifest import Manifest, similar_names
from megatron_doremi.preprocessing.encoding import describe_bad_lines
from megatron_doremi.preprocessing.file_domains import shown_names, single_domain, without_documents
from megatron_doremi.preprocessing.inputs import InputFile
from megatron_doremi.preprocessing.outputs import Outputs
from megatron_doremi.text_table import shown_text, table_lines
from megatron_doremi.tokenization.lost_characters import describe_lost
from megatron_doremi.tokenization.tokenizer import Tokenizer


def print_summary(
    outputs: Outputs,
    holds_out: bool,
    single_reported: bool = False,
    files: Sequence[InputFile] = (),
    extended: Manifest | None = None,
) -> None:
    """Prints a table of what was written, what looks wrong, and what was skipped.

    Args:
        holds_out: whether a part of the documents should be in the valid split.
        single_reported: whether the user already knows of a single domain.
        files: those that were read in full.
        extended: the manifest to which the valid split was added.
    """
    rows = []
    for (domain, split), output in sorted(outputs.by_key.items()):
        tokens = output.writer.num_tokens
        sizes = (f"{output.documents:,}", f"{tokens:,}", f"{output.bytes:,}", f"{output.bytes / max(1, tokens):.2f}")
        rows.append([domain if split == "train" else f"{domain} ({split})", *sizes])
    for line in table_lines(["domain", "documents", "tokens", "bytes", "bytes/token"], rows):
        print(line)
    train, valid = ({domain for domain, split in outputs.by_key if split == each} for each in ("train", "valid"))
    if len(train) == 1 and not single_reported:
        warn(single_domain(*train))
    if holds_out and train - valid:
        text = f"no document is held out of {shown_text(shown_names(train - valid))}"
        warn(f"{text}; more text or a larger --valid-fraction helps")
    if extended and (lacking := [domain.name for domain in extended.domains if domain.valid is None]):
        warn(f"no held-out documents of {shown_text(shown_names(lacking))}: runs are not evaluated on them")
    if without := without_documents(files, outputs.by_key):
        warn(f"domains without a document, since their files are empty: {shown_text(shown_names(without))}")
    for group in similar_names(sorted({domain for domain, _ in outputs.by_key})):
        names_text = " and ".join(map(repr, group))
        warn(f"the domains {names_text} differ only by case or spaces; --domain-rules can merge them")
    if skipped := describe_skipped(outputs):
        print_stdout("; ".join(skipped))


def describe_skipped(outputs: Outputs) -> list[str]:
    """Describes what of the input is missing from the output: empty texts, bad lines, lost characters."""
    messages = []
    if outputs.empty:
        messages.append(f"skipped {outputs.empty:,} empty text{'' if outputs.empty == 1 else 's'}")
    if outputs.bad_total:
        messages.append("skipped " + describe_bad_lines([*outputs.bad_files, *outputs.bad], outputs.bad_total))
    if outputs.lost:
        messages.append(f"the tokenizer lost {describe_lost(outputs.lost, outputs.characters)}")
    return messages


def warn_of_lost_characters(tokenizer: Tokenizer, texts: list[str], max_dropped_share: float) -> None:
    """Warns, before anything is encoded, that the tokenizer loses too many characters of `texts` to be published."""
    lost, characters = tokenizer.lost_characters(texts), sum(map(len, texts))
    if lost.total() > max_dropped_share * characters:
        loss = f"in a sample of the input, the tokenizer loses {describe_lost(lost, characters)}"
        warn(f"{loss}; see --max-dropped-share")
