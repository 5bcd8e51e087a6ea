"""The Reactive Transformer in plain torch: no ranks, no process groups, no memory buffers.

Shape legend, used as suffixes of tensor names throughout the package:

    B  rows of a batch            T  tokens of a row           N  tokens of a whole batch, B * T
    D  residual width             d  head size                 H  heads (G: key/value heads)
    L  stateful (memory) layers   S  memory slots              V  vocabulary
    E  routed experts             K  experts per token         F  hidden width of a feed-forward
    M  MoE layers, or positions selected by a mask             Z  shared experts
"""
