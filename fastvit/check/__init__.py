"""What proves: audit of machine code, ledger of proofs, coverage of models, fp8's certificate."""
