"""Tokenizers: pictures and other signals to tokens and back. Each is an encoder, a quantizer (`jeton.quantizers`) and a
decoder."""

SYSTEMS = ("one_d_piece",)
