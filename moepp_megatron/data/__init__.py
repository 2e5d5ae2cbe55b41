"""Turns text into batches: corpus, tokenizer, Megatron indexed datasets, loader.

blending.py         one order of samples over several folders, stage by stage
chat_template.py    conversations as text, and which tokens of it are answers
compressed.py       source files that may be compressed
conversations.py    conversations as training samples
corpus.py           writes the Megatron indexed dataset, documents shuffled, validation last
datasets.py         opens prepared folders as megatron-core GPT datasets: train, validation, test
document_sources.py which data source the tokens of a sample come from
documents.py        reads documents from source files
encoding.py         turns documents into token ids
reuse.py            decides whether an existing output folder is reused, replaced or refused
external_tokenizers.py  sentencepiece, tiktoken and Hugging Face folders, turned into tokenizer.json
index.py            reads the index of a Megatron indexed dataset, without megatron-core
loader.py           micro-batches in an order that depends only on the samples consumed
long_text.py        cuts long texts where a tokenizer's pre-tokenizer splits them anyway
manifest.py         `manifest.json`: what a prepared folder holds and what it was made from
npz.py              arrays of files of numpy.savez
megatron_files.py   Megatron's own PREFIX.bin and PREFIX.idx, made elsewhere
prepare.py          `moepp data prepare`
prepare_chat.py     reads conversations of every form, writes a folder of them: encoded, packed
prepared_data.py    whether a configuration's data are there and fit its model
progress.py         progress by bytes: a bar on a terminal, a few plain lines elsewhere
same_tokenizer.py   checks that a tokenizer is the one whose token ids a corpus or a model uses
saved_datasets.py   folders of Hugging Face datasets: what in them is data
show.py             what prepared data hold, and what a run will draw of them
sources.py          resolves the user's sources to a fixed order of files
split.py            the split of a corpus's documents into train, validation and test
stdlib.py           the built-in corpus: which of Python's library sources are code
tables.py           a column of text from parquet and Arrow files
token_classes.py    the class of a token: word, fragment, keyword, number, ...
token_check.py      checks samples for tokens outside the vocabulary, before they reach an embedding
token_groups.py     classes of token ids that metrics and rules distinguish
token_frequency.py  classes of token ids by how frequent they are in the training set
tokenizer.py        the tokenizer: a Hugging Face `tokenizers` file and its end-of-document token
verify.py           checks a prepared folder against its manifest, quickly or byte by byte

`prepare.py` writes a dataset folder, `datasets.py` opens it as megatron-core GPT datasets and
`loader.py` iterates over micro-batches. Nothing is imported here: preparing needs no torch until
the very end, and reusing a prepared folder needs none at all.
"""
