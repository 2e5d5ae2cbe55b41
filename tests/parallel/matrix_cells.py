"""The cells of the layout matrix, one a line, in the words of `layouts.WORDS`.

The first number is that of the ranks; data parallelism takes what the other degrees leave.
"""

from tests.parallel.layouts import parse_cells

# Every pair of option values that can meet on up to 8 ranks (a test says which cannot), found by a
# greedy search over random layouts.
PAIRS = parse_cells("""
    2 cp2 reduce re-moe selected sequence no-residual gqa
    4 pp2 ends-apart whole re-uniform sequence mixed capacity
    4 tp2 pp2 interleaved whole re-moe selected sequence two-layers bf16 gqa
    8 etp2 mb1 re-moe allgather nonzero mixed two-layers capacity bf16 z-loss
    8 ep2 etp2 whole mb1 re-moe allgather nonzero global bf16 tied
    8 ep4 etp2 reduce mb1 re-block allgather nonzero global mixed bf16 tied
    8 ep8 gather mb1 re-block allgather no-residual shared
    8 ep8 gather mb1 re-uniform selected mixed capacity gqa
    8 ep8 reduce mb1 allgather sequence mixed vanilla bf16
    8 ep8 cp2 re-uniform allgather selected no-residual capacity tied
    8 pp2 ends-apart ep2 etp2 cp2 gather mb4 allgather nonzero global mixed two-layers gqa
    8 pp2 ends-apart ep4 mb1 re-moe allgather selected global mixed no-residual bf16
    8 pp2 interleaved ep2 etp2 reduce mixed vanilla z-loss
    8 pp2 uneven-interleaved re-block allgather selected mixed bf16 z-loss
    8 pp2 uneven-interleaved ep4 gather allgather sequence mixed no-residual capacity bf16 tied
    8 pp2 uneven etp2 reduce mb1 re-block nonzero sequence mixed two-layers shared
    8 pp2 uneven ep4 whole mb1 re-uniform sequence bf16 z-loss
    8 pp4 ends-apart reduce mb4 re-uniform allgather selected global bf16 shared
    8 pp4 ends-apart ep2 cp2 mb1 re-block nonzero sequence no-residual capacity z-loss
    8 pp4 gather mb1 re-moe allgather nonzero sequence capacity gqa
    8 pp4 interleaved ep2 whole mb4 re-block allgather selected global no-residual
    8 pp4 uneven-interleaved ep2 gather mb4 re-moe allgather selected two-layers capacity bf16
    8 pp4 uneven etp2 whole re-moe allgather mixed no-residual tied
    8 pp4 uneven etp2 cp2 mb4 mixed vanilla gqa
    8 tp2 ep4 etp2 whole re-block nonzero global two-layers bf16 gqa
    8 tp2 ep4 etp2 cp2 reduce mb1 re-moe selected sequence no-residual capacity shared
    8 tp2 ep8 whole mb1 re-block allgather nonzero mixed gqa
    8 tp2 ep8 cp2 mb4 re-moe nonzero global two-layers z-loss
    8 tp2 pp2 ends-apart ep4 cp2 reduce re-block mixed vanilla tied
    8 tp2 pp2 ep4 cp2 gather mb1 allgather selected sequence mixed capacity z-loss
    8 tp2 pp2 interleaved etp2 cp2 gather re-uniform nonzero capacity
    8 tp2 pp2 interleaved ep4 selected sequence mixed tied
    8 tp2 pp2 interleaved ep4 cp2 mb4 re-moe allgather sequence mixed vanilla bf16 shared
    8 tp2 pp2 uneven-interleaved etp2 reduce mb4 re-uniform allgather nonzero global bf16 gqa
    8 tp2 pp2 uneven-interleaved ep2 etp2 cp2 whole selected vanilla shared
    8 tp2 pp2 uneven ep2 etp2 gather mb4 re-uniform allgather selected mixed vanilla
    8 tp2 pp4 uneven ep2 whole mb4 re-uniform global two-layers capacity bf16 tied
    8 ep8 whole mb1 re-moe dedup selected two-layers bf16 tied
    8 ep8 cp2 re-uniform dedup selected sequence mixed no-residual capacity shared
    8 pp2 ends-apart ep2 etp2 cp2 gather mb4 re-block dedup nonzero global tied
    8 pp4 uneven etp2 cp2 reduce mb1 re-moe dedup global two-layers capacity bf16 gqa
    8 tp2 pp2 interleaved ep4 whole dedup mixed z-loss
    8 tp2 pp4 uneven-interleaved ep2 mb4 re-block dedup capacity bf16
""")

# Routings that training rarely reaches, and ranks with few tokens.
CORNERS = parse_cells("""
    2 ep2 gather re-moe no-ffn-token
    4 tp2 ep2 etp2 nonzero no-ffn-token
    4 pp2 interleaved ep2 allgather no-ffn-token
    4 ep4 capacity one-ffn-expert
    8 tp2 pp2 ep4 re-uniform one-ffn-expert
    4 ep4 reduce half-of-ffn-experts
    2 ep2 allgather half-of-ffn-experts
    2 tp2 ep2 half-sequence-without-ffn
    4 ep4 cp2 allgather half-sequence-without-ffn
    8 ep8 mb1 seq1
    8 tp2 ep4 etp2 cp2 mb4 seq8
    2 tp2 ep2 mb8 nonzero capacity seq2
""")

# The deduplicated all-to-all with one thing at a time: what can break in it alone.
DEDUP = parse_cells("""
    2 ep2 dedup
    2 ep2 dedup capacity
    2 tp2 ep2 dedup
    2 ep2 dedup no-ffn-token
    2 tp2 ep2 dedup half-sequence-without-ffn
    2 tp2 ep2 mb8 dedup seq2
    4 ep4 dedup
    4 ep2 etp2 dedup
    4 pp2 ep2 dedup
    4 ep2 cp2 dedup
    4 ep4 re-moe dedup bf16
    4 ep4 dedup one-ffn-expert
    4 ep2 etp2 dedup half-of-ffn-experts
""")

# Every option value once, in few ranks: this part runs with every change.
FAST = parse_cells("""
    2 whole
    2 gather re-uniform bf16
    2 ep2 allgather nonzero capacity
    2 pp2 interleaved re-moe sequence
    2 pp2 uneven mixed two-layers bf16
    4 pp4 ends-apart mb4 re-block tied
    4 pp2 uneven-interleaved ep2 no-residual shared
    4 tp2 ep2 etp2 reduce selected gqa
    4 ep4 cp2 capacity z-loss
    4 tp2 ep2 cp2 nonzero global capacity
    4 tp2 pp2 ep2 vanilla
    8 ep8 mb1 global
    2 ep2 no-ffn-token
    4 tp2 ep2 etp2 re-moe dedup
    4 tp2 gather
""")
