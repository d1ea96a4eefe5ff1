"""Bugs in what becomes of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.anchor import Bug

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/data/rows": (
        ["tests/properties/data/test_data_order.py"],
        [
            Bug("_json_lines", "enumerate(lines, start=1)", "enumerate(lines)"),
            Bug("_json", "not _is_json(following)", "True"),
            Bug(
                "source_fingerprint", "f'{path.resolve()}:{facts.st_size}:{facts.st_mtime_ns}'", "f'{path.resolve()}:'"
            ),
            Bug("_near", "'; did you mean '", "'; perhaps '"),
            Bug("_parquet", "number += 1", "pass"),
        ],
    ),
    "finetune/data/docstrings": (
        ["tests/unit/finetune/data/test_docstrings.py"],
        [
            Bug("docstring_rows", "len(code) <= CODE_CHARACTERS", "True"),
            Bug("docstring_rows", "function.body[1:]", "function.body[:]"),
            Bug("docstring_rows", "code not in seen", "True"),
            Bug("_sources", "sorted(found)", "sorted(found)[::-1]"),
            Bug("_sources", "set(folders) - _LEFT_OUT", "set(folders)"),
            Bug("_sentence", "paragraph[:1].isupper() and paragraph.endswith('.')", "paragraph.endswith('.')"),
            Bug("_sentence", "written and len(paragraph) in _DOCSTRING_CHARACTERS", "written"),
        ],
    ),
    "finetune/data/csv_rows": (
        ["tests/properties/data/test_data_tables.py", "tests/properties/data/test_data_files.py"],
        [
            Bug("_named", "len(values) < len(header) and any(header[len(values):])", "False"),
            Bug("_named", "value.strip() and (not _is_number(value))", "value.strip()"),
            Bug("read_csv", "before + reader.line_num + 1", "line_number + 1"),
            Bug("read_csv", "name.startswith(' ')", "name"),
            Bug("delimiter_of", "known[0]", "known[-1]"),
            Bug("_covered", "last > first", "False"),
        ],
    ),
    "finetune/data/formats": (
        ["tests/properties/data/test_data_files.py", "tests/properties/data/test_data_tables.py"],
        [
            Bug("is_format", "set(needed) <= set(columns)", "set(needed) & set(columns)"),
            Bug("holds", "('', [], {})", "('',)"),
            Bug("shown", "len(text) <= SHOWN_CHARACTERS", "True"),
            Bug("is_nothing", "math.isnan(value)", "False"),
            Bug("kind", "is_nothing(value)", "False"),
        ],
    ),
    "finetune/data/file_kind": (
        ["tests/properties/data/test_data_files.py"],
        [
            Bug("what_it_is", "any(zeros)", "any(letters)"),
            Bug("require_parquet", "beginning != _PARQUET", "False"),
            Bug("first_byte_that_is_not_utf8", "error.start + 1", "error.start"),
            Bug("require_text", "what_it_is(path)", "None"),
            Bug("what_it_is", "whole[first::2]", "whole"),
        ],
    ),
    "finetune/data/encode": (
        ["tests/properties/data/test_data_encoding.py"],
        [
            Bug("_tokenized", "learned_up_to[ends] > learned_up_to[offsets[:, 0]]", "learned_up_to[offsets[:, 0]] > 0"),
            Bug("encode", "labels[:config.seq]", "labels[-config.seq:]"),
            Bug("encode", "max(0, len(ids) - config.seq)", "int(len(ids) > config.seq)"),
            Bug("targets", "labels[1:]", "labels"),
            Bug("_ended", "text + ending", "text"),
            Bug("_ended", "ending and text.rstrip().endswith(ending)", "False"),
        ],
    ),
    "finetune/data/tokens": (
        ["tests/properties/data/test_data_order.py"],
        [
            Bug("_Tally.keep", "self.digest.update(coded.labels.tobytes())", "pass"),
            Bug("_examples", "coded.cut > 0", "coded.cut"),
            Bug(
                "_key",
                "[FORMAT, source, config.seq, config.train_on_prompt, config.skip_bad_rows, tokenizer.chat_"
                "template, [tokenizer.bos_token, tokenizer.eos_token, type(tokenizer).__name__], backend.to"
                "_str() if backend is not None else sorted(tokenizer.get_vocab().items())]",
                "[FORMAT, config.seq, config.train_on_prompt, config.skip_bad_rows, tokenizer.chat_template"
                ", [tokenizer.bos_token, tokenizer.eos_token, type(tokenizer).__name__], backend.to_str() i"
                "f backend is not None else sorted(tokenizer.get_vocab().items())]",
            ),
            Bug("_examples", "not config.skip_bad_rows", "config.skip_bad_rows"),
            Bug("_write", "shutil.rmtree(aside, ignore_errors=True)", "pass"),
            Bug("_examples", "not learned", "False"),
        ],
    ),
    "finetune/data/packing": (
        ["tests/properties/data/test_data_order.py"],
        [
            Bug("pack", "left >= length", "left > length"),
            Bug("pack", "free[place] -= length", "free[place] -= length - 1"),
            Bug("pack", "done.append(held.pop(fullest))", "held.pop(fullest)"),
            Bug("pack", "np.random.default_rng([_PACKING, seed])", "np.random.default_rng()"),
            Bug("pack", "packed[:-1]", "packed[1:]"),
            Bug("lengths_of_rows", "position_ids[:, :-1] + 1", "position_ids[:, :-1]"),
        ],
    ),
    "finetune/data/batches": (
        ["tests/properties/data/test_data_order.py"],
        [
            Bug("collate", "labels[line, begin] = IGNORED", "pass"),
            Bug("collate", "begin = end", "begin = 0"),
            Bug("window_sequences", "(number + 1) * size", "(number + 1) * size - 1"),
            Bug("window_sequences", "[_ORDER, config.seed, epoch]", "[_ORDER, config.seed]"),
            Bug("_split", "np.setdiff1d(index, held)", "index"),
            Bug("windows", "range(start_step, total_steps(train, config))", "range(total_steps(train, config))"),
        ],
    ),
    "finetune/training/sample": (
        ["tests/properties/training/test_sample.py"],
        [
            Bug("_prompt", "example.input_ids[:first]", "example.input_ids[:first + 1]"),
            Bug("choose_question", "min(prompts, key=len)", "max(prompts, key=len)"),
            Bug("_templated", "add_generation_prompt=True", "add_generation_prompt=False"),
            Bug("_chat", "add_special_tokens=False", "add_special_tokens=True"),
            Bug("answer", "(0, ids.shape[1]:)", "0"),
            Bug("answer", "model.train(was_training)", "model.train()"),
            Bug("answer", "do_sample=False", "do_sample=True"),
            Bug("choose_question", "config.answer_tokens == 0", "False"),
            Bug(
                "choose_question",
                "_question_in(tokenizer, shortest)[-_SHOWN:]",
                "_question_in(tokenizer, shortest)[:_SHOWN]",
            ),
        ],
    ),
    "finetune/data/messages": (
        ["tests/properties/data/test_conversations.py"],
        [
            Bug("blamed_on_the_row", "(BadRowError, MemoryError)", "BadRowError"),
            Bug(
                "blamed_on_the_row",
                "not isinstance(error, Exception) and type(error).__name__ != 'PanicException'",
                "not isinstance(error, Exception)",
            ),
            Bug("is_withheld", "message['role'] == 'assistant' and message.get('weight') == 0", "False"),
            Bug("for_template", "{'weight', without} - {'content'}", "{'weight'}"),
            Bug("_message", "message.get('weight', 1) not in (0, 1)", "False"),
            Bug("_as_object", "parsed_json(arguments, dict)", "arguments"),
            Bug("_message", "message.setdefault('content', '')", "pass"),
        ],
    ),
    "finetune/data/conversation": (
        ["tests/properties/data/test_conversations.py"],
        [
            Bug("_Renderer.__call__", "self.tools", "None"),
            Bug("_beginning_unasked", "learned.strip() and answered.endswith(learned)", "False"),
            Bug("_with_arguments_as_taken", "str(value) in text", "False"),
            Bug("_cut", "withheld=withheld", "withheld=False"),
            Bug("_cut", "Part(text=whole[place:], learned=False)", "Part(text=whole[place:], learned=True)"),
            Bug("_without_own_end", "end and content.endswith(end)", "False"),
            Bug(
                "_left_out",
                "not render.differs(messages, whole, without=key)",
                "render.differs(messages, whole, without=key)",
            ),
        ],
    ),
    "finetune/model/embeddings": (
        ["tests/unit/finetune/model/test_embeddings.py", "tests/properties/model/test_embedding_tables.py"],
        [
            Bug("tables_of", "tokens = min(tokens, _rows(head))", "pass"),
            Bug("_position_limits", "(yield (module.num_embeddings - kept))", "(yield module.num_embeddings)"),
            Bug("_position_limits", "module.padding_idx + 1", "0"),
            Bug("check_tables", "counts.largest_id >= tables.tokens", "counts.largest_id > tables.tokens"),
            Bug("check_tables", "counts.longest > tables.positions", "counts.longest > tables.positions + 20"),
            Bug("padded_within", "pad < tables.tokens", "True"),
            Bug("resize_embeddings", "weight[:before]", "weight"),
            Bug("new_token_rows", "[words, head] if own_head else [words]", "[words]"),
        ],
    ),
    "finetune/dryrun/trial_data": (
        ["tests/unit/finetune/dryrun/test_trial_data.py"],
        [
            Bug("tokenizer_of", "find_shape(name) is not None", "name == 'smollm2-135m'"),
            Bug("tokenizer_of", "ModelError", "KeyError"),
            Bug("check_rows", "not all((Path(name).is_file() for name in files))", "False"),
            Bug("check_rows", "check_tables(tables_of(model), data, tokenizer, config)", "pass"),
            Bug("check_rows", "tokenizer is not None", "True"),
        ],
    ),
}
