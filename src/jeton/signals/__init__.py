"""Systems for signals that are neither text nor pictures. Those that make tokens of a signal and signals of tokens are in
`jeton.tokenizers`; here are the ones that work on the channels of a signal."""

SYSTEMS = ("ccm",)
