"""The mathematics in plain torch: error feedback, compressors, windows, Gram matrix, coefficients.

All modules have the same layout: tensors of one shape are handled as a stack of n, and a stack's gradient is (n, rows, cols).
The 2-D view of a tensor is (shape[0], product of the rest); of a 0-D or 1-D tensor it is (1, numel).
Symbols: m window size, r rank, k kept entries per row, G the window (row i = c_i), K = G G^T, j the newest slot, e the error.
"""
