"""Turns text into batches: corpus, tokenizer, Megatron indexed datasets, loader.

blending.py         one order of samples over several folders, stage by stage
chat_template.py    conversations as text, and which tokens of it are answers
corpus.py           writes the Megatron indexed dataset, documents shuffled, validation last
datasets.py         opens prepared folders as megatron-core GPT datasets: train, validation, test
documents.py        reads documents from source files
encoding.py         turns documents into token ids
external_tokenizers.py  sentencepiece, tiktoken and Hugging Face folders, turned into tokenizer.json
index.py            reads the index of a Megatron indexed dataset, without megatron-core
loader.py           micro-batches in an order that depends only on the samples consumed
long_text.py        cuts long texts where a tokenizer's pre-tokenizer splits them anyway
manifest.py         `manifest.json`: what a prepared folder holds and what it was made from
npz.py              arrays of files of numpy.savez
prepare.py          `moepp data prepare`
prepare_chat.py     reads conversations of every form, writes a folder of them: encoded, packed
prepared_data.py    whether a configuration's data are there and fit its model and tokenizer
progress.py         progress by bytes: a bar on a terminal, a few plain lines elsewhere
samples.py          samples with the data source of each token; conversations as samples
show.py             what prepared data hold, and what a run will draw of them
source_files.py     reads a source file: text, compressed or not; rows of parquet and Arrow
source_filters.py   which files are text: of Hugging Face datasets, of the built-in corpus
sources.py          resolves the user's sources to a fixed order of files
split.py            the split of a corpus's documents into train, validation and test
token_classes.py    classes of tokens: word, fragment, keyword, ...; of token ids, by frequency too
tokenizer.py        the tokenizer: a Hugging Face `tokenizers` file and its end-of-document token
verify.py           checks a prepared folder by its manifest, and Megatron's own PREFIX.bin and .idx

`prepare.py` writes a dataset folder, `datasets.py` opens it as megatron-core GPT datasets and
`loader.py` iterates over micro-batches. Nothing is imported here: preparing needs no torch until
the very end, and reusing a prepared folder needs none at all.
"""
