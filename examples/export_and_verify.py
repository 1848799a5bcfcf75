"""Export a MobileViT from Python and read the verdict. Replace the seeded weights with your checkpoint."""

from mvit_export import export, load_model

model = load_model("xxs", num_classes=10)  # weights="my_checkpoint.pt" for real ones
for result in export(model, to="onnx", out="artifacts"):
    verdict = result.parity
    print(result.artifact.path.name, verdict.status, f"{verdict.metrics.psnr_db:.1f} dB", result.artifact.model_path)
