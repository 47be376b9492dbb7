"""The operations, by what they are about; argument names are those that SGLang passes by keyword."""
