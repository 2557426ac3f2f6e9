"""Fine-tuning jobs in the process of an engine, as `serve.jobs.FineTuning`: `train.service.service.Service`."""
