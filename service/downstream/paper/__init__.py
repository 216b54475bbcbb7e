"""Figures of the LoRot paper, from any models: each kind draws pictures and gives the numbers behind them."""
